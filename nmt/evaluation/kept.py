"""Translations that `nmt evaluate` kept in the report folder of a run, if the run would make the same ones again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nmt.checkpoint import Checkpoint
from nmt.config import DecodingConfig
from nmt.evaluation.sets import EvaluationSet, sha256_of
from nmt.files import read_json, read_regular
from nmt.run import RunDirectory

_SHAPE = {"sources_sha256": str, "hypotheses_sha256": str, "parameters_sha256": str, "decoding": {str: object}}
# `parameters_sha256` covers what these settings choose.
_CHOOSING = ("checkpoint", "average_checkpoints")


def origin(hypotheses: Sequence[str], steps: Sequence[int], chosen: Sequence[Checkpoint]) -> dict[str, str]:
    """Return what the JSON report records of translations by the model of these `steps`, the mean of `chosen`.

    Besides, the report has the set (`EvaluationSet.to_dict`) and the settings `decoding.*`. If the run was trained in
    the meantime, so that `chosen` are of other steps, the parameters are unknown: "".
    """
    known = [step for each in chosen for step in each.steps] == list(steps)
    return {
        "hypotheses_sha256": sha256_of(hypotheses),
        "parameters_sha256": _parameters_sha256(chosen) if known else "",
    }


def kept_translations(run: RunDirectory, text: EvaluationSet, decoding: DecodingConfig) -> list[str] | None:
    """Return the kept translations of `text`; None if there are none that this run would make now.

    They must be of the same sources and direction, by the same parameters, with the same settings, and unchanged.
    Nothing of this can be known of reports by older versions. CheckpointError as for `RunDirectory.chosen`.
    """
    parameters = _parameters_sha256(run.chosen(decoding))
    try:
        report = read_json(run.report / f"{text.name}.json", _SHAPE)
        hypotheses = read_regular(run.report / f"{text.name}.hypotheses").decode().split("\n")[:-1]
    except (OSError, ValueError):
        return None
    wanted = text.to_dict()
    same = (
        all(report.get(name, "") == wanted.get(name, "") for name in ("direction", "tag"))
        and report["sources_sha256"] == sha256_of(text.sources)
        and report["parameters_sha256"] == parameters
        and report["hypotheses_sha256"] == sha256_of(hypotheses)
        and _searched(report["decoding"]) == _searched(asdict(decoding))
    )
    return hypotheses if same and len(hypotheses) == len(text.sources) else None


def _parameters_sha256(chosen: Sequence[Checkpoint]) -> str:
    """Return a hash of the vocabulary and the parameters of these checkpoints, from their manifests."""
    known = [
        [
            each.manifest["vocabulary"],
            {name: file["sha256"] for name, file in each.manifest["files"].items() if name.startswith("model")},
        ]
        for each in chosen
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _searched(decoding: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a translation by given parameters."""
    return {name: value for name, value in decoding.items() if name not in _CHOOSING}
