"""Early warning that a weight matrix is losing rank, decided on the host from the recorded stable ranks. No jax."""

import numpy as np

# A block adds to the residual stream only what these two projections let through.
_RESIDUAL_PROJECTIONS = ("/attn_out", "/mlp_down")


def is_bottleneck(layer: str) -> bool:
    """Whether a loss of rank in this layer cannot be made good by another.

    The product of matrices has no more rank than any of its factors. Within a block the residual projections come last,
    so the rank of all that the block can write is theirs. The table `embed` is the output head: logits lie in the space
    it spans (the softmax bottleneck, Yang et al. 2018), and the gradient of every other layer has passed through it.
    """
    return layer == "embed" or layer.endswith(_RESIDUAL_PROJECTIONS)


class RankFalling:
    """Stable rank fell below a share of its value at the first observation, per layer.

    The share is `strict_threshold`, the higher one, for the layers of `is_bottleneck`, and `threshold` for the others;
    0 never warns. The first observation of a layer is its first stable rank that is finite and above 0 (no matrix but
    zero has one below 1). NaN and infinities are passed over: such weights have their own alerts.

    Random matrices have the largest stable rank there is, and healthy training takes most of it away in its first
    steps: in a byte-level model of two blocks from 30 to 4-16 within 100 steps, in bfloat16. So observations at steps
    up to `after`, which is the warm-up's length, do not count. From there on the same kind of model fell to 0.26 of the
    first observation at most, and to 0.57 in a bottleneck, over 500 steps at a high learning rate.

    The state follows from the recorded values alone, so that a resumed run decides the same. Values are compared as the
    float32 numbers they are, since the record holds shorter decimals of them.
    """

    def __init__(self, threshold, strict_threshold, history=(), after=-1):
        """history: [(step, {layer: stable rank}), ...] in the record's order, from the first row on."""
        self.threshold, self.strict_threshold = threshold, strict_threshold
        self.after, self.first, self.fallen = after, {}, set()
        for step, values in history:
            self.begins(values, step)

    def begins(self, values, step=np.inf):
        """Take one more observation {layer: stable rank}, made after `step` updates.

        Returns:
          [(layer, share of the first value)] for the layers where the condition begins with it. It begins once, and is
          re-armed by an observation at or above the threshold.
        """
        begun = []
        if step <= self.after:
            return begun
        for layer, value in values.items():
            value = float(np.float32(value))
            if not np.isfinite(value):
                continue
            if layer not in self.first:
                if value > 0:
                    self.first[layer] = value
                continue
            share = value / self.first[layer]
            if share >= (self.strict_threshold if is_bottleneck(layer) else self.threshold):
                self.fallen.discard(layer)
            elif layer not in self.fallen:
                self.fallen.add(layer)
                begun.append((layer, share))
        return begun
