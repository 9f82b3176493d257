"""Tables of a quantization, for the console and for the model card."""

from typing import Any

from deit.core.console import format_percent, info, table
from deit.core.filesystem import format_bytes
from deit.viz.tables import head_name, markdown_table

_HEAD_COLUMNS = ("head", "float top-1 %", "int8 top-1 %", "agreement %", "signal to noise dB")
_FILE_COLUMNS = ("", "float", "int8", "int8 / float")
_LAYER_COLUMNS = ("layer", "signal to noise dB", "share of the noise %", "top-1 %", "weights")
_MAX_FLOAT_LAYERS = 6


def print_quantization(report: dict[str, Any]) -> None:
    """Print accuracy, size and latency of the float and the int8 file.

    report: the content of quantization.json, as deit.deploy.quantize writes it.
    """
    images = f"{report['num_samples']} {report['split']} images"
    title = f"{report['run']} ({report['checkpoint']}), int8 by {report['method']}, {images}"
    table(title, _HEAD_COLUMNS, _head_rows(report))
    table(_file_title(report), _FILE_COLUMNS, _file_rows(report))
    info(_batch_line(report))
    if "vs_run" in report:
        info(_fake_quant_line(report))


def print_sensitivity(sensitivity: dict[str, Any]) -> None:
    """Print the layers, the noisiest first. sensitivity: that part of quantization.json."""
    images = f"{sensitivity['num_samples']} {sensitivity['split']} images"
    table(
        f"each layer alone in int8, on {images} (float top-1 "
        f"{format_percent(sensitivity['top1'])} %)",
        _LAYER_COLUMNS,
        [
            (
                row["layer"],
                _format_decibels(row["sqnr_db"]),
                format_percent(row["noise_share"]),
                format_percent(row["top1"]),
                f"{row['weights']:,}",
            )
            for row in sensitivity["layers"]
        ],
    )


def quantization_card(report: dict[str, Any]) -> str:
    """Return the section on quantization of the model card, as Markdown."""
    lines = [*describe(report), _batch_line(report)]
    if "vs_run" in report:
        lines.append(_fake_quant_line(report))
    file_title = _file_title(report)
    return "\n\n".join(
        [
            "\n".join(f"- {line}" for line in lines),
            markdown_table(_HEAD_COLUMNS, _head_rows(report)),
            f"{file_title[:1].upper()}{file_title[1:]}:",
            markdown_table(_FILE_COLUMNS, _file_rows(report)),
        ]
    )


def describe(report: dict[str, Any]) -> list[str]:
    """Return lines on what was quantized and how."""
    int8_layers, float_layers = report["int8_layers"], report["float_layers"]
    products = [name for name in float_layers if name in report["products"]]
    others = [name for name in float_layers if name not in products]
    num_more = len(others) - _MAX_FLOAT_LAYERS
    in_float = [f"the {len(products)} products within attention"] if products else []
    in_float += others[:_MAX_FLOAT_LAYERS]
    in_float += [f"{num_more} more"] if num_more > 0 else []
    bits = "7 bits (reduce_range)" if report["reduce_range"] else "8 bits"
    flags = ", ".join(report["environment"]["int8_flags"]) or "no known int8 extension"
    return [
        f"int8: {len(int8_layers)} of {len(int8_layers) + len(float_layers)} matrix products and "
        f"convolutions, {format_percent(report['int8_share'])} % of the parameters; weights by "
        "output channel, activations by tensor",
        f"float: {', '.join(in_float) or 'none of these'}; normalization, softmax, activation "
        "functions",
        f"ranges of activations: {_describe_ranges(report['calibration'])}",
        f"weights of {bits}, for a processor with {flags}; on an x86 processor without VNNI and "
        "AMX, sums of 8-bit products can saturate: quantize on that machine",
    ]


def _describe_ranges(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "computed in every batch (dynamic), no calibration"
    if calibration["method"] == "trained":
        return "from training with fake quantization, no calibration"
    percentile = calibration["percentile"]
    method = calibration["method"] + ("" if percentile is None else f" {percentile:g}")
    return (
        f"{method} over {calibration['num_samples']} training images in their evaluation view, "
        f"stratified by class (seed {calibration['seed']})"
    )


def _head_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            head_name(head),
            format_percent(report["float"]["heads"][head]["top1"]),
            format_percent(row["top1"]),
            format_percent(report["agreement"][head]),
            _format_decibels(report["sqnr_db"][head]),
        )
        for head, row in report["int8"]["heads"].items()
    ]


def _file_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    before, after = report["float"], report["int8"]
    share = after["bytes"] / before["bytes"]
    rows = [("file", format_bytes(before["bytes"]), format_bytes(after["bytes"]), f"{share:.2f}")]
    for batch, old in before["latency"].items():
        new = after["latency"][batch]
        ratio = f"{new['median_ms'] / old['median_ms']:.2f}"
        rows.append((f"batch of {batch}, ms", _format_latency(old), _format_latency(new), ratio))
    return rows


def _file_title(report: dict[str, Any]) -> str:
    environment = report["environment"]
    return (
        f"size and latency (median, p10 to p90, interleaved) by ONNX Runtime on "
        f"{environment['threads']} thread(s) of {environment['device_name']}"
    )


def _format_latency(row: dict[str, float]) -> str:
    low, high = row["p10_ms"], row["p90_ms"]
    return f"{row['median_ms']:.3g} ({low:.3g} to {high:.3g})"


def _batch_line(report: dict[str, Any]) -> str:
    batches = report["batches"]
    sizes = ", ".join(map(str, batches["sizes"]))
    return (
        f"between batches of {sizes}, int8 logits of an image differ by "
        f"{batches['difference']:.2g} at most, and {batches['num_changed_predictions']} of "
        f"{batches['num_samples']} predictions"
    )


def _fake_quant_line(report: dict[str, Any]) -> str:
    """Compare the file with the run that was trained for it; `float` is neither of them."""
    comparison = report["vs_run"]
    head = "fused" if "fused" in comparison["sqnr_db"] else "class"
    bits = ", but with weights of 8 bits instead of 7" if report["reduce_range"] else ""
    return (
        f"the run itself computes with this quantization{bits}: "
        f"agreement {format_percent(comparison['agreement'][head])} %, signal to noise "
        f"{_format_decibels(comparison['sqnr_db'][head])} dB; float is the run without fake "
        "quantization"
    )


def _format_decibels(value: float | None) -> str:
    return "no noise" if value is None else f"{value:.1f}"
