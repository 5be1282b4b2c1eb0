"""Published claims about recipes, each as one paired comparison of two arms that differ in one thing."""

from dataclasses import dataclass

from altgrad_jax.report import statistics
from altgrad_jax.report.runs import RECIPE, Arm
from altgrad_jax.report.statistics import BETTER, EQUIVALENT, INCONCLUSIVE, WORSE, Judged


@dataclass(frozen=True)
class Claim:
    """That training by one recipe ends at a higher loss than by another.

    words: the claim. source: where it is from. higher, lower: the recipes. Where a recipe keeps other layers in the
    compute dtype than its name says, both do: `higher~head` is compared with `lower~head`.
    """

    words: str
    source: str
    higher: str
    lower: str


# Sources are arXiv numbers.
CLAIMS = (
    Claim("the forward pass costs more than the backward pass", "2509.25149, appendix D", "nvfp4:fprop",
          "nvfp4:backward"),
    Claim("wgrad in MXFP4 costs more than fprop", "2605.09825", "mxfp4:wgrad", "mxfp4:fprop"),
    Claim("wgrad in MXFP4 costs more than dgrad", "2605.09825", "mxfp4:wgrad", "mxfp4:dgrad"),
    Claim("all blocks in NVFP4 cost more than all but the last", "2509.25149", "nvfp4~head", "nvfp4"),
    Claim("weights in blocks of 16x16 cost more than of 1x16", "2601.22813", "nvfp4", "nvfp4_w1x16"),
    Claim("fixed Hadamard signs cost more than redrawn ones", "docs/bias.md (2605.09825: the opposite)",
          "nvfp4_headroom", "nvfp4_redrawn"),
    Claim("stochastic rounding that clips costs more than with headroom", "2510.27527, an unbiased backward pass",
          "nvfp4", "nvfp4_headroom"),
    Claim("stochastic rounding of gradients costs more than MS-EDEN", "2601.22813", "quartet_2_sr", "quartet_2"),
    Claim("a Hadamard transform helps a uniform grid", "2606.20381", "ufp4_no_rht", "ufp4"),
    Claim("a Hadamard transform hurts E2M1", "2606.20381", "ufp4_e2m1", "ufp4_e2m1_no_rht"),
    Claim("with Hadamard transforms E2M1 costs more than a uniform grid", "2606.20381", "ufp4_e2m1", "ufp4"),
    Claim("MXFP8 scales rounded down cost more than rounded up", "2506.08027", "mxfp8_floor", "mxfp8"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What the runs say of a claim: the two arms, and the Judged loss of the first minus that of the second."""

    claim: Claim
    higher: Arm
    lower: Arm
    judged: Judged

    @property
    def verdict(self) -> str:
        """supported, contradicted, equivalent within the margin, or inconclusive; by tests corrected over the claims.

        A difference that is separated from 0 and within the margin supports or contradicts, and its size is said.
        """
        kind, within = self.judged.kind, f"within {self.judged.margin:g}"
        if kind == EQUIVALENT and self.judged.sign:
            return f"{'supported' if self.judged.sign > 0 else 'contradicted'}, {within}"
        return {WORSE: "supported", BETTER: "contradicted", EQUIVALENT: f"equivalent {within}"}.get(kind, INCONCLUSIVE)


def findings(c) -> list[Finding]:
    """The Finding of every claim of which a Comparison has both arms, each at its own rate; one family of tests.

    An arm is a recipe in every layer that it does not keep, with AdamW and a float32 master.
    """
    found = [(claim, *arms) for claim in CLAIMS for arms in _arms_of(claim, set(c.arms))]
    differences = [c.difference(*((arm, c.choice(arm).rate) for arm in arms)) for _, *arms in found]
    return [Finding(*one, judged) for one, judged in zip(found, statistics.judge(differences, c.margin), strict=True)]


def _arms_of(claim, arms):
    """[(arm, arm)] of the claim, with all that their names may have behind a `~` in common."""
    kept = sorted({arm.format.partition("~")[2] for arm in arms})
    for suffix in (f"~{words}" if words else "" for words in kept):
        both = Arm(f"{RECIPE}{claim.higher}{suffix}"), Arm(f"{RECIPE}{claim.lower}{suffix}")
        if set(both) <= arms:
            yield both
