"""What the pictures of the results show, as plain data; `benchmarks.plots` draws it.

Data are of numbers, strings and lists alone, so that a picture can carry a hash of what it shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .comparisons import Comparison, comparisons, newest_rows
from .results import Row, Run

Data = dict[str, Any]
ENDINGS = ("svg", "png")
"""Of the files of a picture."""

PEER_NAMES = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "sdpa": "SDPA",
    "sdpa_flash": "SDPA's FlashAttention",
    "sdpa_cudnn": "SDPA's cuDNN",
    "sdpa_efficient": "SDPA's efficient",
    "sdpa_shared": "SDPA, shared",
    "flex": "FlexAttention",
    "fused_cell": "PyTorch's fused cell",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_flash": "ONNX Runtime, flash",
    "liger": "Liger",
    "torch": "torch.nn",
    "torch_compile": "torch.compile",
    "torch_packed": "torch.nn, packed",
    "torch_padded": "torch.nn, padded",
    "hugging_face": "Hugging Face",
    "ctranslate2": "CTranslate2",
}
"""Of providers, as pictures call them; others by their own name."""


FAMILIES = {
    "attention": "forward + backward",
    "layers": "forward + backward",
    "decoding": "one step",
    "whole models": "",
}
"""Of the first picture, and what of them was timed."""


class Main(NamedTuple):
    """A row of the first picture."""

    family: str
    label: str
    op: str
    cases: tuple[str, ...]
    """One for each kind of device; the first that was measured."""
    direction: str = "forward+backward"


MAIN = (
    Main("attention", "full", "attention", ("full_512", "full_2048_D64")),
    Main("attention", "causal", "attention", ("causal_512", "causal_2048_D64")),
    Main("attention", "half padding", "attention", ("padded_512", "padded_2048_D64")),
    Main("layers", "add & norm", "add_layer_norm", ("4096x1024", "16384x4096_gpu")),
    Main(
        "layers",
        "bias, GELU, dropout",
        "bias_activation_dropout",
        ("4096x2048_gelu_dropout", "16384x4096_gelu_dropout"),
    ),
    Main("layers", "LSTM cell", "recurrent_cell", ("lstm_4096x512", "lstm_16384x1024")),
    Main(
        "layers",
        "additive attention",
        "additive_attention",
        ("translation", "translation_large"),
    ),
    Main("layers", "pointer-generator loss", "copy_distribution", ("nll_1024x32000_gate",)),
    Main("decoding", "one query", "decode_attention", ("self_512", "self_4096_gpu"), "forward"),
    Main(
        "decoding",
        "one query, 4 beams",
        "decode_attention",
        ("cross_512_4_beams", "cross_1024_4_beams_gpu"),
        "forward",
    ),
    Main(
        "decoding",
        "step of beam search",
        "beam_search",
        ("B16_K4_V32000", "B16_K4_V32000_gpu"),
        "forward",
    ),
)
"""Ordinary sizes of every op; both directions where it has a gradient."""
MODELS = {
    ("transformer", "training_step"): "Transformer, training",
    ("rnn", "training_step"): "RNN Seq2Seq, training",
    ("transformer", "greedy"): "Transformer, greedy",
    ("transformer", "beam_4"): "Transformer, beam 4",
    ("rnn", "beam_4"): "RNN Seq2Seq, beam 4",
}
"""Whole models, by model and task: the first case that was measured beside a peer."""


def stamp(data: Data) -> str:
    """What a picture carries, to tell whether it shows these data."""
    text = json.dumps(data, sort_keys=True)
    return f"data {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def device_name(run: Run) -> str:
    """A device in a few words."""
    machine = run.machine
    if machine["device"] == "cuda":
        return str(machine["name"])
    instructions = {"avx512": "AVX-512", "avx2": "AVX2"}.get(
        machine["our_instructions"], machine["our_instructions"]
    )
    return f"{machine['name']}, {instructions}, {machine['threads']} threads"


def headline(runs: Sequence[Run]) -> Data | None:
    """How many times as fast as each peer, of the main cases; None where there are none."""
    rows = []
    for main in MAIN:
        known = _known(runs, "operators", op=main.op, direction=main.direction)
        found = (one for case in main.cases for one in known if one.what["case"] == case)
        one = next(found, None)
        if one is not None:
            rows.append(_headline_row(main.family, main.label, one))
    for (model, task), label in MODELS.items():
        one = next(iter(_known(runs, "models", model=model, task=task)), None)
        if one is not None:
            rows.append(_headline_row("whole models", label, one))
    return {"device": device_name(runs[0]), "rows": rows} if rows else None


def _known(runs: Sequence[Run], suite: str, **wanted: str) -> list[Comparison]:
    """Of the newest run that has them, those with ours and a peer."""
    _, rows = newest_rows(runs, suite, **wanted) or (None, [])
    return _half_first(one for one in comparisons(rows) if one.ours and one.peers)


def _headline_row(family: str, label: str, one: Comparison) -> Data:
    ours = one.fastest
    assert ours is not None
    peers = [
        {"name": PEER_NAMES.get(name, name), "times": _times_as_long(row, ours, one)}
        for name, row in one.peers.items()
    ]
    peers.sort(key=lambda peer: peer["times"])
    return {"family": family, "about": FAMILIES[family], "label": label, "peers": peers}


def _times_as_long(row: Row, ours: Row, one: Comparison) -> float:
    """The paired ratio where it was taken to this provider of ours."""
    if ours is one.first and "ratio" in row:
        return float(row["ratio"][1])
    return float(row["p50_ms"] / ours["p50_ms"])


def _half_first(known: Iterable[Comparison]) -> list[Comparison]:
    """Of a case's dtypes, 16 bits come first, in which models are trained on a GPU; 8 bits last."""
    return sorted(known, key=lambda one: {"float32": 1, "int8": 2}.get(one.what["dtype"], 0))


def _longest(known: Iterable[Comparison]) -> list[Comparison]:
    """Of each case and dtype both directions together, or the only one that there is."""
    return list({(c.what["case"], c.what["dtype"]): c for c in known}.values())


def roofline(runs: Sequence[Run]) -> Data | None:
    """Operations a byte and operations a second of each case, ours and its best peer's."""
    found = newest_rows(runs, "roof")
    if found is None:
        return None
    roof = found[1][-1]
    ops: dict[str, list[Data]] = {}
    seen = dict.fromkeys(row["op"] for run in runs for row in run.suite("operators"))
    for op in seen:
        for one in _longest(_known(runs, "operators", op=op)):
            ours, peer = one.fastest, one.best_peer
            assert ours is not None
            assert peer is not None
            if not ours.get("flop") or not ours.get("bytes"):
                continue
            point = {
                "case": one.what["case"],
                "dtype": one.what["dtype"],
                "intensity": ours["flop"] / ours["bytes"],
                "ours": ours["flop"] / ours["p50_ms"] * 1e3,
                "peer": ours["flop"] / peer["p50_ms"] * 1e3,
            }
            ops.setdefault(op, []).append(point)
    if not ops:
        return None
    rates = [moved / seconds for moved, seconds in roof["copies"]]
    return {
        "device": device_name(runs[0]),
        "products": roof["products"],
        "memory": rates[-1],
        "cache": max(rates),
        "ops": ops,
    }


def shares(run: Run, rows: Sequence[Row]) -> Data | None:
    """Of an op's cases, the shares of the roof that ours and the peers reach, by direction."""
    panels: dict[str, list[Data]] = {}
    known = comparisons(rows)
    several = len({one.what["dtype"] for one in known}) > 1
    for one in _half_first(known):
        ours = one.fastest
        if ours is None or "share_of_roof" not in ours:
            continue
        peers = {
            PEER_NAMES.get(name, name): ours["floor_ms"] / row["p50_ms"]
            for name, row in one.peers.items()
        }
        label = one.what["case"] + (f" {one.what['dtype']}" if several else "")
        entry = {"label": label, "ours": ours["share_of_roof"], "peers": peers}
        panels.setdefault(one.what["direction"], []).append(entry)
    op = rows[0]["op"]
    return {"device": device_name(run), "op": op, "panels": panels} if panels else None


def scaling(run: Run, rows: Sequence[Row]) -> Data:
    """Times, memory and the model's floor of an op against its sizes.

    Args:
        run: Where the rows are from.
        rows: Of the suite ``scaling``, of one op.
    """
    panels: dict[tuple[str, str, str], Data] = {}
    for row in rows:
        if "p50_ms" not in row:
            continue
        key = (row["dimension"], row["direction"], row["dtype"])
        panel = panels.setdefault(
            key, {**dict(zip(("dimension", "direction", "dtype"), key, strict=True)), "lines": {}}
        )
        lines = panel["lines"].setdefault(row["provider"], [])
        names = ("value", "p20_ms", "p50_ms", "p80_ms", "floor_ms", "peak_bytes", "held_bytes")
        lines.append({name: row.get(name) for name in names})
    for panel in panels.values():
        for line in panel["lines"].values():
            line.sort(key=lambda point: point["value"])
    return {"device": device_name(run), "op": rows[0]["op"], "panels": list(panels.values())}
