"""A report as the runner makes one, without a run."""

from smelt.core.report import Report, Row

STAGES = (("original", 459632, 98.22, 114760), ("train", 47573, 98.0, 9714), ("code.huffman", 9183, 98.11, 9714))


def report() -> Report:
    rows = []
    for step, (after, size, accuracy, nonzeros) in enumerate(STAGES):
        rows += [
            Row(step, after, "file", size, "bytes"),
            Row(step, after, "parameters", 114760),
            Row(step, after, "non-zeros", nonzeros),
            Row(step, after, "MACs", 260520, "per sample", simulated=step > 0),
            Row(step, after, "peak memory", 1048864, "bytes", simulated=step > 0),
            Row(step, after, "latency", 1.25, "ms", (1.2, 1.5), simulated=step > 0),
            Row(step, after, "accuracy", accuracy, "%"),
        ]
    layers = [
        {
            "name": "fc.weight",
            "shape": [500, 200],
            "stored": "sparse(values: codebook)",
            "bytes": 6877,
            "bits": 0.55,
            "dense_bytes": 400000,
            "zeros": 0.926,
        },
        {"name": "fc.bias", "shape": [], "stored": "dense", "bytes": 4, "bits": 32.0, "dense_bytes": 4, "zeros": 0.0},
    ]
    recipe = {"steps": [{"train": {"epochs": 5}}, {"code.huffman": {}}]}
    return Report(rows, {"machine": "a <tiny> one", "date": "2026-11-22"}, recipe, layers, ["2: left fc.bias alone"])
