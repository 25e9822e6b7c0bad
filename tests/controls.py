"""What switches a method's unlabeled side off: it must then be SupOnly."""

OFF: dict[str, dict[str, object]] = {
    "mean_teacher": {"lambda_u": 0},
    "cutmix_seg": {"lambda_u": 0},
    "cct": {"weight": 0},
    "gct": {"consistency": 0, "correction": 0},
    "cps": {"lambda_cps": 0},
    "pseudoseg": {"weight": 0, "head_weight": 0},
    "pc2seg": {"consistency": 0, "contrast": 0},
    "ael": {"weight": 0, "paste": 0},
    "u2pl": {"lambda_u": 0, "lambda_c": 0},
    "fixmatch": {"lambda_u": 0},
    "unimatch": {"lambda_s": 0, "lambda_fp": 0},
    "unimatch_v2": {"lambda_u": 0},
}
"""What switches a method's unlabeled side off."""
HALVED = ("fixmatch", "unimatch", "unimatch_v2")
"""Their releases halve L_s."""
