"""The same training step in PyTorch, in a process of its own, driven over a pipe. The only module that imports torch.

  python -m altgrad_jax.bench.torch_peer

A line of JSON comes in, a line goes out; it is idle in between. Requests: `facts`; `build` (a model and its
optimizer under a name); `steps` (of a model: so many training steps, and the loss fetched once at the end); `product`
(the device's rate); `free`. An answer is what was asked for, or {"error": one line}. Every answer to `steps` tells what
CPU time this process used since its answer before, while it should have been idle (`idle_cpu_s` of `idle_s`).

A step is what ours is: mean cross entropy over all tokens of random windows, gradient, clipping to a global norm, AdamW
with decoupled weight decay of the arrays with two or more axes. Parameters and moments are float32; "bfloat16" means
autocast. The forward pass and the loss are what is compiled; clipping and the (fused) optimizer are torch's own.
Products of float32 are left at torch's default precision, float32.
"""

# torch and transformers come with the extra `bench`.
# pyright: reportMissingImports=false

import importlib.util
import json
import os
import sys
import time

N_WINDOWS = 64  # of random tokens


def load_nanogpt(path):
    """The module model.py in a nanoGPT checkout (a folder) or a file."""
    file = os.path.join(path, "model.py") if os.path.isdir(path) else path
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec and spec.loader, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_loss(request, device):
    """(model, function (tokens, targets) -> mean cross entropy) of a `build` request."""
    import torch

    shape = request["shape"]
    if request["kind"] == "nanogpt":
        module = load_nanogpt(request["path"])
        model = module.GPT(
            module.GPTConfig(
                block_size=shape["block_size"],
                vocab_size=shape["vocab_size"],
                n_layer=shape["n_layer"],
                n_head=shape["n_head"],
                n_embd=shape["n_embd"],
                dropout=0.0,
                bias=True,
            )
        ).to(device)
        return model, lambda tokens, targets: model(tokens, targets)[1]
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["block_size"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(device)

    def loss(tokens, targets):
        logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return model, loss


def make_steps(request, device):
    """(function n -> (seconds, last loss), facts) of a `build` request."""
    import torch

    torch.manual_seed(0)
    model, loss_fn = make_loss(request, device)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    o = request["optimizer"]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": o["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        groups, lr=o["learning_rate"], betas=(o["beta1"], o["beta2"]), eps=o["adam_eps"], fused=True
    )
    B, L = request["batch_size"], request["shape"]["block_size"]
    windows = torch.randint(request["shape"]["vocab_size"], (N_WINDOWS, B, L + 1), device=device)
    if request["compile"]:
        loss_fn = torch.compile(loss_fn)
    autocast = torch.autocast(device_type=device, dtype=torch.bfloat16, enabled=request["dtype"] == "bfloat16")
    made = 0

    def steps(n):
        nonlocal made
        started, loss = time.perf_counter(), None
        for _ in range(n):
            batch = windows[made % N_WINDOWS]
            with autocast:
                loss = loss_fn(batch[:, :-1], batch[:, 1:])
            loss.backward()
            if o["grad_clip"]:
                torch.nn.utils.clip_grad_norm_(parameters, o["grad_clip"])
            adam.step()
            adam.zero_grad(set_to_none=True)
            made += 1
        last = None if loss is None else loss.item()  # waits for the device
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, last

    return steps, {"parameters": sum(p.numel() for p in parameters)}


def product_seconds(request, device):
    """Seconds of `repeats` products [n, n] [n, n] of a dtype."""
    import torch

    dtype, n = getattr(torch, request["dtype"]), request["n"]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    started = time.perf_counter()
    c = a
    for _ in range(request["repeats"]):
        c = a @ b
    c[0, 0].item()
    return time.perf_counter() - started


def facts(device):
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }


class Server:
    """Answers requests; `programs`: {name: function n -> (seconds, loss)}."""

    def __init__(self, device):
        self.device, self.programs, self.answered = device, {}, None

    def answer(self, request):
        """The answer to one request, a dict."""
        do = request["do"]
        if do == "facts":
            return facts(self.device)
        if do == "build":
            started = time.perf_counter()
            memory = {}
            before = self._allocated(reset=True)
            steps, found = make_steps(request, self.device)
            steps(1)  # torch compiles at the first call
            if before is not None:
                memory = {"memory_bytes": self._allocated() - before}
            self.programs[request["name"]] = steps
            return found | memory | {"compile_s": time.perf_counter() - started}
        if do == "steps":
            return dict(zip(("seconds", "loss"), self.programs[request["name"]](request["n"]), strict=True))
        if do == "product":
            return {"seconds": product_seconds(request, self.device)}
        if do == "free":
            import torch

            self.programs.clear()
            torch.compiler.reset()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            return {}
        raise ValueError(f"no such request: {do}")

    def _allocated(self, reset=False):
        """Most bytes that torch had allocated on the GPU, since the reset; None on a CPU."""
        if self.device != "cuda":
            return None
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    def respond(self, line):
        """The line of JSON that answers a line of JSON."""
        idle = {}
        if self.answered is not None:
            wall, cpu = self.answered
            idle = {"idle_s": time.perf_counter() - wall, "idle_cpu_s": time.process_time() - cpu}
        try:
            answer = self.answer(json.loads(line)) | idle
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            answer = {"error": f"{type(error).__name__}: {text}"}
        self.answered = time.perf_counter(), time.process_time()
        return json.dumps(answer)


def main():
    # Libraries may print: only answers go to the pipe.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from altgrad_jax.bench.roofline import cpu_count

    torch.set_num_threads(cpu_count())
    server = Server("cuda" if torch.cuda.is_available() else "cpu")
    for line in sys.stdin:
        print(server.respond(line), file=out, flush=True)


if __name__ == "__main__":
    main()
