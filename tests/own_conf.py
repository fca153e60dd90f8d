"""The files of conf/ that are the project's own, by group: those that users add are not under test."""

OWN = {
    "corpus": (
        "europarl_en_fr",
        "europarl_en_fr_both",
        "files",
        "mtdata",
        "multi30k",
        "multi30k_en_de",
        "phrasebook",
        "wmt14_en_de",
        "wmt14_en_fr",
    ),
    "model": (
        "dense",
        "gnmt",
        "gnmt_v2",
        "inherited",
        "medium",
        "moe",
        "moe_s17",
        "small",
    ),
    "training": (
        "paper",
        "short",
    ),
    "decoding": (
        "gnmt",
        "greedy",
    ),
    "experiment": (
        "demo",
        "europarl_en_fr_dense",
        "europarl_en_fr_million",
        "europarl_en_fr_million_small",
        "europarl_en_fr_moe_32",
        "europarl_en_fr_moe_4",
        "europarl_en_fr_study",
        "europarl_en_fr_study_small",
        "fine_tune",
        "multi30k_12_directions",
        "multi30k_en_de_dense",
        "multi30k_en_de_moe_32",
        "multi30k_en_de_moe_4",
        "own_small",
        "wmt14_en_de_dense",
        "wmt14_en_de_gnmt",
        "wmt14_en_de_gnmt_v2",
        "wmt14_en_de_moe_32",
        "wmt14_en_de_s17",
        "wmt14_en_fr_moe_2048",
    ),
}

COMPLETE = tuple(name for name in OWN["experiment"] if name != "fine_tune")
"""The experiments that need no run to start from."""
