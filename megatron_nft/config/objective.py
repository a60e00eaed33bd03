"""What each objective's paper sets, and who uses which setting. The losses themselves are in megatron_nft/objectives.py."""

from typing import Any

# A setting that is left out has the value here; a setting that is not here does not belong to the objective.
PUBLISHED: dict[str, dict[str, Any]] = {
    # arXiv 2505.18116: Eq. 10; reduction_constant is the authors' for one data-parallel rank
    "nft": {"neg_weight": 1.0, "normalize": 1, "eps": 1.0, "ratio": "token", "reduction": "constant"},
    "rft": {"neg_weight": 0.0, "normalize": 0, "eps": 1.0, "ratio": "token", "reduction": "constant"},  # the same paper's baseline
    # arXiv 2402.03300, Eq. 3, without its KL term
    "grpo": {"normalize": 2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "signed_reward": False, "ratio": "token",
             "reduction": "sequence-mean"},
    # arXiv 2503.20783: no division by the standard deviation nor by the length of the answer
    "dr_grpo": {"normalize": 1, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "signed_reward": False, "ratio": "token",
                "reduction": "constant"},
    # arXiv 2503.14476: clip-higher, token mean; scores are +-1, to which the overlong penalty is added
    "dapo": {"normalize": 2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "signed_reward": True, "ratio": "token",
             "reduction": "token-mean"},
    # arXiv 2507.18071, Eq. 5 to 7 and section 5.1
    "gspo": {"normalize": 2, "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4, "signed_reward": False, "ratio": "geometric",
             "reduction": "sequence-mean"},
    # arXiv 2506.13585, Eq. 4 and 5: no lower bound; the upper one is not published, 4 is within the range that arXiv 2510.13786 tried
    "cispo": {"normalize": 2, "clip_ratio_low": 1.0, "clip_ratio_high": 4.0, "signed_reward": True, "ratio": "token",
              "reduction": "token-mean"},
    # after arXiv 2503.14286: the ratio of wrong answers within [0, 1], that of right ones left out
    "topr": {"normalize": 1, "signed_reward": False, "ratio": "sequence", "reduction": "constant"},
}  # fmt: skip
POLICY_GRADIENT = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "topr")  # weigh answers by their advantage within the group
AUTHORS_DAPO = -1.0  # the NFT authors' spelling of DAPO, as a neg_weight
REDUCTION_CONSTANT = 1000.0  # the authors' code, per data-parallel rank; with the sequence ratio it divides by nothing


def complete(objective) -> None:
    """Fill what an ObjectiveConfig leaves out with what its paper sets. An unknown name is left for `check` to report."""
    if objective.name == "nft" and objective.neg_weight == AUTHORS_DAPO:
        forget(objective)
        objective.name = "dapo"
    for key, value in PUBLISHED.get(objective.name, {}).items():
        if getattr(objective, key) is None:
            setattr(objective, key, value)
    if objective.reduction_constant is None:
        objective.reduction_constant = 1.0 if objective.ratio == "sequence" else REDUCTION_CONSTANT


def forget(objective) -> None:
    """Set to None whatever depends on the name: what another objective's paper set does not carry over."""
    for key in OWN_SETTINGS:
        setattr(objective, key, None)


OWN_SETTINGS = tuple(dict.fromkeys([key for settings in PUBLISHED.values() for key in settings] + ["reduction_constant"]))
