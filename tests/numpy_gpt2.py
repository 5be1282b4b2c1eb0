"""GPT-2 in float64 NumPy, forward and backward by hand: the oracle of the model.

The definition is that of Radford et al. 2019 and the published GPT-2 code (pre-LayerNorm, learned
positions, tanh-GELU, tied head). Nothing here is taken from, or shared with, the package: attention is
computed one sequence and one head at a time, and each backward function is the chain rule written out.
Parameters are the package's nested dict of arrays.

Axes: B batch, L length, D width, C width of a head, V vocabulary, R rows (any leading axes).
"""

import numpy as np

EPS = 1e-5
GELU_CONSTANT = np.sqrt(2 / np.pi)


def as_float64(tree):
    """The same nested dict with float64 NumPy leaves."""
    if isinstance(tree, dict):
        return {name: as_float64(child) for name, child in tree.items()}
    return np.asarray(tree).astype(np.float64)


def flat(tree, prefix=""):
    """{"block_0/ln_1/scale": array, ...} of a nested dict."""
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    leaves = {}
    for name, child in tree.items():
        leaves.update(flat(child, f"{prefix}/{name}" if prefix else name))
    return leaves


class Linear:
    """y = r(x) r(w) + b and its straight-through backward; r rounds an operand (the identity by default)."""

    def __init__(self, weights, rounding):
        self.rounding = rounding
        self.kernel, self.bias = rounding(weights["kernel"]), weights["bias"]

    def forward(self, x_RK):
        self.x_RK = self.rounding(x_RK)
        return self.x_RK @ self.kernel + self.bias

    def backward(self, dy_RN):
        rounded_RN = self.rounding(dy_RN)
        self.gradient = {"kernel": self.x_RK.T @ rounded_RN, "bias": dy_RN.sum(0)}
        return rounded_RN @ self.kernel.T


class LayerNorm:
    def __init__(self, weights):
        self.scale, self.bias = weights["scale"], weights["bias"]

    def forward(self, x_RD):
        mean = x_RD.mean(-1, keepdims=True)
        self.inverse_std = 1 / np.sqrt(((x_RD - mean) ** 2).mean(-1, keepdims=True) + EPS)
        self.normal_RD = (x_RD - mean) * self.inverse_std
        return self.normal_RD * self.scale + self.bias

    def backward(self, dy_RD):
        self.gradient = {"scale": (dy_RD * self.normal_RD).sum(0), "bias": dy_RD.sum(0)}
        dn_RD = dy_RD * self.scale
        along_RD = self.normal_RD * (dn_RD * self.normal_RD).mean(-1, keepdims=True)
        return self.inverse_std * (dn_RD - dn_RD.mean(-1, keepdims=True) - along_RD)


class Gelu:
    def forward(self, x):
        self.x = x
        self.tanh = np.tanh(GELU_CONSTANT * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + self.tanh)

    def backward(self, dy):
        d_inner = GELU_CONSTANT * (1 + 3 * 0.044715 * self.x**2)
        return dy * (0.5 * (1 + self.tanh) + 0.5 * self.x * (1 - self.tanh**2) * d_inner)


class Attention:
    """Causal attention of one sequence, head by head; q, k, v, probabilities and result are rounded."""

    def __init__(self, n_head, rounding):
        self.n_head, self.rounding = n_head, rounding

    def forward(self, qkv_L3D):
        L, width = qkv_L3D.shape[0], qkv_L3D.shape[1] // 3
        C = width // self.n_head
        rounded = self.rounding(qkv_L3D)
        out_LD = np.zeros((L, width))
        self.heads = []
        for h in range(self.n_head):
            q_LC, k_LC, v_LC = (rounded[:, part * width + h * C : part * width + (h + 1) * C] for part in range(3))
            probability_LL = np.zeros((L, L))
            for t in range(L):
                scores = np.array([q_LC[t] @ k_LC[s] for s in range(t + 1)]) / np.sqrt(C)
                powers = np.exp(scores - scores.max())
                probability_LL[t, : t + 1] = powers / powers.sum()
            out_LD[:, h * C : (h + 1) * C] = self.rounding(probability_LL) @ v_LC
            self.heads.append((q_LC, k_LC, v_LC, probability_LL))
        return self.rounding(out_LD)

    def backward(self, dout_LD):
        L, width = dout_LD.shape
        C = width // self.n_head
        dqkv_L3D = np.zeros((L, 3 * width))
        for h, (q_LC, k_LC, v_LC, p_LL) in enumerate(self.heads):
            dout_LC = dout_LD[:, h * C : (h + 1) * C]
            dp_LL = dout_LC @ v_LC.T
            dscores_LL = p_LL * (dp_LL - (dp_LL * p_LL).sum(-1, keepdims=True)) / np.sqrt(C)
            for part, gradient in enumerate((dscores_LL @ k_LC, dscores_LL.T @ q_LC, p_LL.T @ dout_LC)):
                dqkv_L3D[:, part * width + h * C : part * width + (h + 1) * C] = gradient
        return dqkv_L3D


class Block:
    def __init__(self, weights, n_head, rounding):
        self.layers = {name: LayerNorm(weights[name]) for name in ("ln_1", "ln_2")}
        self.layers |= {
            name: Linear(weights[name], rounding) for name in ("attn_qkv", "attn_out", "mlp_up", "mlp_down")
        }
        self.attention, self.gelu = Attention(n_head, rounding), Gelu()

    def forward(self, x_LD):
        layer = self.layers
        qkv_L3D = layer["attn_qkv"].forward(layer["ln_1"].forward(x_LD))
        x_LD = x_LD + layer["attn_out"].forward(self.attention.forward(qkv_L3D))
        hidden = self.gelu.forward(layer["mlp_up"].forward(layer["ln_2"].forward(x_LD)))
        return x_LD + layer["mlp_down"].forward(hidden)

    def backward(self, dx_LD):
        layer = self.layers
        dhidden = self.gelu.backward(layer["mlp_down"].backward(dx_LD))
        dx_LD = dx_LD + layer["ln_2"].backward(layer["mlp_up"].backward(dhidden))
        dqkv_L3D = self.attention.backward(layer["attn_out"].backward(dx_LD))
        return dx_LD + layer["ln_1"].backward(layer["attn_qkv"].backward(dqkv_L3D))

    def gradient(self):
        return {name: layer.gradient for name, layer in self.layers.items()}


def _add(a, b):
    if a is None:
        return b
    return {name: _add(a[name], b[name]) for name in b} if isinstance(b, dict) else a + b


def run(params, tokens_BL, n_head, targets_BL=None, rounding=lambda x: x):
    """Logits [B, L, V]; with targets also the mean cross-entropy in nats and the gradient of every parameter.

    `rounding` is applied to the operands of every product, and its derivative is taken as 1.
    Returns (logits, loss or None, gradients or None), all float64.
    """
    params = as_float64(params)
    tokens_BL = np.asarray(tokens_BL)
    table, positions = params["embed"]["embedding"], params["pos_embed"]["embedding"]
    n_blocks = sum(name.startswith("block_") for name in params)
    all_logits, loss, gradients = [], 0.0, None
    for b, tokens_L in enumerate(tokens_BL):
        x_LD = np.array([table[token] + positions[t] for t, token in enumerate(tokens_L)])
        blocks = [Block(params[f"block_{i}"], n_head, rounding) for i in range(n_blocks)]
        for block in blocks:
            x_LD = block.forward(x_LD)
        ln_f = LayerNorm(params["ln_f"])
        head_in_LD = rounding(ln_f.forward(x_LD))
        logits_LV = head_in_LD @ rounding(table).T
        all_logits.append(logits_LV)
        if targets_BL is None:
            continue

        dlogits_LV = np.zeros_like(logits_LV)
        for t, target in enumerate(np.asarray(targets_BL)[b]):
            powers_V = np.exp(logits_LV[t] - logits_LV[t].max())
            probability_V = powers_V / powers_V.sum()
            loss -= np.log(probability_V[target]) / tokens_BL.size
            dlogits_LV[t] = probability_V / tokens_BL.size
            dlogits_LV[t, target] -= 1 / tokens_BL.size
        rounded_LV = rounding(dlogits_LV)
        gradient = {
            "embed": {"embedding": rounded_LV.T @ head_in_LD},
            "pos_embed": {"embedding": np.zeros_like(positions)},
        }
        dx_LD = ln_f.backward(rounded_LV @ rounding(table))
        gradient["ln_f"] = ln_f.gradient
        for i in reversed(range(n_blocks)):
            dx_LD = blocks[i].backward(dx_LD)
            gradient[f"block_{i}"] = blocks[i].gradient()
        for t, token in enumerate(tokens_L):
            gradient["embed"]["embedding"][token] += dx_LD[t]
            gradient["pos_embed"]["embedding"][t] += dx_LD[t]
        gradients = _add(gradients, gradient)
    return np.array(all_logits), None if targets_BL is None else loss, gradients
