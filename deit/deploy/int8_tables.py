"""An int8 file beside its float one, for a person: on the console and in the card."""

from typing import Any

from deit.core.console import format_percent, info, table
from deit.core.filesystem import format_bytes
from deit.viz.tables import markdown_table

_HEADS = ("head", "float top-1 %", "int8 top-1 %", "agreement %", "signal to noise dB")
_FILES = ("", "float", "int8", "int8 / float")
_NAMED = 6
_LAYERS = ("layer", "signal to noise dB", "share of the noise %", "top-1 %", "weights")


def print_quantization(found: dict[str, Any]) -> None:
    """What int8 changes of the answers, and what it saves. found: as deit.deploy.quantize makes
    it."""
    images = f"{found['num_samples']} {found['split']} images"
    title = f"{found['run']} ({found['checkpoint']}), int8 by {found['method']}, {images}"
    table(title, _HEADS, _head_rows(found))
    table(_timing(found), _FILES, _file_rows(found))
    info(_batches(found))
    if "as_the_run" in found:
        info(_beside_the_run(found))


def print_sensitivity(found: dict[str, Any]) -> None:
    """The layers, worst first. found: the part `sensitivity` of what deit.deploy.quantize makes."""
    table(
        f"each layer alone in int8, on {found['num_samples']} {found['split']} images (float top-1 "
        f"{format_percent(found['top1'])} %)",
        _LAYERS,
        [
            (
                row["layer"],
                _decibels(row["sqnr_db"]),
                format_percent(row["noise_share"]),
                format_percent(row["top1"]),
                f"{row['weights']:,}",
            )
            for row in found["layers"]
        ],
    )


def quantization_card(found: dict[str, Any]) -> str:
    """How it was quantized and what that did, as Markdown for the card."""
    lines = [*describe(found), _batches(found)]
    if "as_the_run" in found:
        lines.append(_beside_the_run(found))
    return "\n\n".join(
        [
            "\n".join(f"- {line}" for line in lines),
            markdown_table(_HEADS, _head_rows(found)),
            f"{_timing(found)[:1].upper()}{_timing(found)[1:]}:",
            markdown_table(_FILES, _file_rows(found)),
        ]
    )


def describe(found: dict[str, Any]) -> list[str]:
    """What became int8 and how, a line each."""
    integers, floats = found["int8_layers"], found["float_layers"]
    products = [name for name in floats if name in found["products"]]
    others = [name for name in floats if name not in products]
    kept = [f"the {len(products)} products within attention"] if products else []
    kept += [*others[:_NAMED], *([f"{len(others) - _NAMED} more"] if len(others) > _NAMED else [])]
    bits = "7 bits (reduce_range)" if found["reduce_range"] else "8 bits"
    flags = ", ".join(found["environment"]["int8_flags"]) or "no extension that is told"
    return [
        f"int8: {len(integers)} of {len(integers) + len(floats)} matrix products and convolutions, "
        f"{format_percent(found['int8_share'])} % of the parameters; weights by output channel, "
        "activations by tensor",
        f"float: {', '.join(kept) or 'none of these'}; normalisations, softmax, activations",
        f"ranges of activations: {_ranges(found['calibration'])}",
        f"weights of {bits}, for a processor with {flags}; where an x86 processor has neither VNNI "
        "nor AMX, sums of 8 bits may be cut off: quantize there",
    ]


def _ranges(seen: dict[str, Any] | None) -> str:
    if seen is None:
        return "found in every batch anew (dynamic), no calibration"
    if seen["how"] == "learnt":
        return "learnt in training, which computed with these roundings; no calibration"
    level = "" if seen["percentile"] is None else f" {seen['percentile']:g}"
    return (
        f"{seen['how']}{level} over {seen['num_samples']} training images in their evaluation "
        f"view, of every class alike (seed {seen['seed']})"
    )


def _head_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            head,
            format_percent(found["float"]["heads"][head]["top1"]),
            format_percent(row["top1"]),
            format_percent(found["agreement"][head]),
            _decibels(found["sqnr_db"][head]),
        )
        for head, row in found["int8"]["heads"].items()
    ]


def _file_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    before, after = found["float"], found["int8"]
    share = after["bytes"] / before["bytes"]
    rows = [("file", format_bytes(before["bytes"]), format_bytes(after["bytes"]), f"{share:.2f}")]
    for batch, old in before["latency"].items():
        new = after["latency"][batch]
        ratio = f"{new['median_ms'] / old['median_ms']:.2f}"
        rows.append((f"batch of {batch}, ms", _spread(old), _spread(new), ratio))
    return rows


def _timing(found: dict[str, Any]) -> str:
    about = found["environment"]
    return (
        f"size and time (median, p10 to p90, in turns) by ONNX Runtime on {about['threads']} "
        f"thread(s) of {about['device_name']}"
    )


def _spread(row: dict[str, float]) -> str:
    low, high = row["p10_ms"], row["p90_ms"]
    return f"{row['median_ms']:.3g} ({low:.3g} to {high:.3g})"


def _batches(found: dict[str, Any]) -> str:
    alike = found["batches"]
    sizes = ", ".join(map(str, alike["sizes"]))
    return (
        f"asked in batches of {sizes}, int8 logits of an image differ by {alike['difference']:.2g} "
        f"at most, and {alike['other_answers']} of {alike['num_samples']} answers"
    )


def _beside_the_run(found: dict[str, Any]) -> str:
    """A file beside the run that was trained for it; `float` is neither of them."""
    same = found["as_the_run"]
    head = "fused" if "fused" in same["sqnr_db"] else "class"
    bits = " but of weights, 7 bits instead of 8" if found["reduce_range"] else ""
    return (
        f"the run itself computes with these roundings{bits}: "
        f"{format_percent(same['agreement'][head])} % "
        f"of the file's answers are the run's, {_decibels(same['sqnr_db'][head])} dB from it; "
        "float is its weights without any"
    )


def _decibels(value: float | None) -> str:
    return "no noise" if value is None else f"{value:.1f}"
