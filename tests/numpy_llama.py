"""Llama in NumPy and float64, token by token and head by head: the oracle of altgrad_jax.models.llama.

Written from the papers (Touvron et al. 2023; Su et al. 2021, with complex numbers; Zhang and Sennrich 2019; Shazeer
2020; Ainslie et al. 2023), and without any of the model's own arithmetic.
"""

import numpy as np

EPS, THETA = 1e-6, 10_000.0


def rms_norm(x, gain):
    return x / np.sqrt(np.mean(x * x) + EPS) * gain


def rotate(x, position):
    """A head's vector at a position: the pair (c, c + C/2) as a complex number, times e^(i position / theta^(2c/C))."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * THETA ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([turned.real, turned.imag])


def silu(x):
    return x / (1 + np.exp(-x))


def attention(block, h, n_head, n_kv_head):
    """Causal attention of the normed tokens h [L, D]."""
    L, D = h.shape
    C = D // n_head
    qkv = [np.split(token @ block["attn_qkv"]["kernel"], n_head + 2 * n_kv_head) for token in h]

    def head(t, j, kind):
        if kind is None:
            return qkv[t][j]
        x = qkv[t][j]
        if kind in block:
            x = rms_norm(x, block[kind]["scale"])
        return rotate(x, t)

    out = np.zeros((L, D))
    for t in range(L):
        for j in range(n_head):
            shared = j // (n_head // n_kv_head)
            q = head(t, j, "q_norm")
            scores = np.array([q @ head(s, n_head + shared, "k_norm") for s in range(t + 1)]) / np.sqrt(C)
            weights = np.exp(scores - scores.max())
            values = np.array([head(s, n_head + n_kv_head + shared, None) for s in range(t + 1)])
            out[t, j * C : (j + 1) * C] = weights / weights.sum() @ values
    return out @ block["attn_out"]["kernel"]


def logits(params, tokens, n_head, n_kv_head):
    """float64 [L, V] of one sequence of tokens [L]; params: nested dict of float64 arrays."""
    x = params["embed"]["embedding"][tokens]
    for i in range(sum(name.startswith("block_") for name in params)):
        block = params[f"block_{i}"]
        h = np.array([rms_norm(token, block["norm_1"]["scale"]) for token in x])
        x = x + attention(block, h, n_head, n_kv_head)
        h = np.array([rms_norm(token, block["norm_2"]["scale"]) for token in x])
        gated = silu(h @ block["mlp_gate"]["kernel"]) * (h @ block["mlp_up"]["kernel"])
        x = x + gated @ block["mlp_down"]["kernel"]
    x = np.array([rms_norm(token, params["norm_f"]["scale"]) for token in x])
    table = params["head"]["embedding"] if "head" in params else params["embed"]["embedding"]
    return x @ table.T


def loss(params, tokens_BL, targets_BL, n_head, n_kv_head):
    """Mean cross entropy in nats per token."""
    losses = []
    for tokens, targets in zip(tokens_BL, targets_BL):
        z = logits(params, tokens, n_head, n_kv_head)
        z = z - z.max(-1, keepdims=True)
        losses.append(np.log(np.exp(z).sum(-1)) - z[np.arange(len(targets)), targets])
    return np.mean(losses)
