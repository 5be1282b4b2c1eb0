"""Other implementations of the same training step, timed in the same rounds as ours. No jax, no torch.

They run in one child process (torch_peer) that is driven over a pipe and idle between its turns: its memory and threads
are its own, and each side has all cores when it is its turn. That the other side is idle is measured, not assumed:
`idle_share` is the CPU time that the peer used between its turns over that time, `own_idle_share` what we used during
its turns.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from altgrad_jax.bench import roofline
from altgrad_jax.bench.timing import Entry, Unavailable
from altgrad_jax.errors import UserError

INSTALL = 'pip install -e ".[bench]"'
CHILD = (sys.executable, "-m", "altgrad_jax.bench.torch_peer")
# kind of model, compiled, dtype
VARIANTS = {
    f"{label}, {how}, {dtype}": (kind, how == "torch.compile", dtype)
    for kind, label in (("gpt2", "transformers GPT-2"), ("nanogpt", "nanoGPT"))
    for how in ("eager", "torch.compile")
    for dtype in ("float32", "bfloat16")
}


def torch_importable():
    """Whether torch and transformers are installed; imports neither."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def require_nanogpt(path):
    """The path, if it holds a nanoGPT checkout's model.py; UserError otherwise."""
    file = Path(path) / "model.py" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"--nanogpt={path} holds no model.py: give the folder of a nanoGPT checkout")
    return str(file)


class Peer:
    """The child process; `close` ends it.

    Attributes:
      facts: what it tells about itself: versions, device, threads.
    """

    def __init__(self, command=CHILD, nanogpt=None):
        self.nanogpt = nanogpt
        self.idle_s = self.idle_cpu_s = self.busy_s = self.own_cpu_s = 0.0
        self._lock, self._errors = threading.Lock(), tempfile.TemporaryFile("w+")
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        assert self._child.stdin and self._child.stdout, "both are pipes"
        self._requests, self._answers = self._child.stdin, self._child.stdout
        try:
            self.facts = self.request(do="facts")
        except BaseException:
            self.close()
            raise

    def request(self, **fields):
        """Its answer to a request, a dict; Unavailable if it is an error or the process has ended."""
        with self._lock:
            started, cpu = time.perf_counter(), time.process_time()
            try:
                self._requests.write(json.dumps(fields) + "\n")
                line = self._answers.readline()
            except (OSError, ValueError):
                line = ""
            if not line:
                self._errors.seek(0)
                said = self._errors.read().strip().splitlines()
                raise Unavailable(f"the peer's process has ended ({said[-1][:200] if said else 'it said nothing'})")
            answer = json.loads(line)
            if "error" in answer:
                raise Unavailable(answer["error"])
            if fields["do"] == "steps":
                self.busy_s += time.perf_counter() - started
                self.own_cpu_s += time.process_time() - cpu
                self.idle_s += answer.get("idle_s", 0.0)
                self.idle_cpu_s += answer.get("idle_cpu_s", 0.0)
            return answer

    def idleness(self):
        """{idle_share, own_idle_share}: see the module."""
        return {
            "idle_share": self.idle_cpu_s / self.idle_s if self.idle_s else None,
            "own_idle_share": self.own_cpu_s / self.busy_s if self.busy_s else None,
        }

    def variants(self):
        """Names of all it can be asked for."""
        return [name for name, (kind, *_) in VARIANTS.items() if kind == "gpt2" or self.nanogpt]

    def entry(self, name, *, shape, batch_size, steps, optimizer, free_bytes=None):
        """Builds a variant and compiles it; an Entry.

        Args:
          shape: n_layer, n_head, n_embd, block_size, vocab_size. optimizer: learning_rate, beta1, beta2, adam_eps,
            weight_decay, grad_clip.
          free_bytes: of the device; Unavailable where that is clearly too little.
        """
        kind, compiled, dtype = VARIANTS[name]
        roofline.require_memory(least_memory(shape, batch_size), free_bytes)
        answer = self.request(
            do="build",
            name=name,
            kind=kind,
            compile=compiled,
            dtype=dtype,
            shape=shape,
            batch_size=batch_size,
            optimizer=optimizer,
            path=self.nanogpt,
        )
        return Entry(
            name,
            lambda: self.request(do="steps", name=name, n=steps)["seconds"],
            steps,
            facts={name: value for name, value in answer.items() if not name.startswith("idle")}
            | {"peer": True, "dtype": dtype},
        )

    def product(self, dtype, n, repeats):
        """An Entry: a product of two [n, n] arrays, `repeats` times."""
        return Entry(
            f"torch product, {dtype}",
            lambda: self.request(do="product", dtype=dtype, n=n, repeats=repeats)["seconds"],
            repeats,
            facts={"dtype": dtype, "flops": 2 * n**3},
        )

    def close(self):
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended before it read everything
            self._requests.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._answers.close()
        self._errors.close()


def least_memory(shape, batch_size):
    """Bytes a peer's step needs at the least: state and gradients, logits with their gradient, what blocks save."""
    tokens = batch_size * shape["block_size"]
    return 16 * roofline.parameters_of(**shape) + tokens * (
        8 * shape["vocab_size"] + 2 * 34 * shape["n_layer"] * shape["n_embd"]
    )
