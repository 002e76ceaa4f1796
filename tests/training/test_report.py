"""The report of an evaluation: a table for people, plain values for machines."""

import json

from dyntok.training.report import ClassifierResult, EvaluationReport, ProbeResult, TokenCounts


def report_of_everything():
    return EvaluationReport(
        images=897,
        failed=(("bad", "not an image"),),
        policy="learned",
        selection="learned",
        refine=0,
        positions=True,
        tokens=TokenCounts(95.25, 31.0, 12, 201),
        bits_per_pixel=0.0755,
        codebook_size=8192,
        usage=0.713,
        perplexity=3120.4,
        jpeg_correlation=0.62,
        psnr=19.714,
        ssim=0.531,
        teacher=ClassifierResult("mobilenetv2_100", 0.71, 300, 10, 0.98, 0.612),
        probe=ProbeResult(300, 2000, 0, 10, 10, 0.451, 0.312, 0.139, 0.09, 0.188),
    )


def test_report_is_plain_json():
    report = report_of_everything()
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["images"] == 897 and values["failures"] == 1 and values["failed"] == [["bad", "not an image"]]
    assert values["tokens"] == {"mean": 95.25, "std": 31.0, "min": 12, "max": 201}
    assert values["teacher"]["accuracy_reconstructions"] == 0.612 and values["probe"]["difference"] == 0.139
    assert values["feature_cosine"] is None


def test_table_is_aligned_and_has_units():
    lines = report_of_everything().table().splitlines()
    column = lines[0].index("897")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    text = "\n".join(lines)
    for part in (
        "95.2 mean, 31.0 std, 12 to 201",
        "0.0755 (codes alone)",
        "71.3 % of 8192 codes",
        "19.71 dB",
        "98.0 % of 300 images",
    ):
        assert part in text
    assert "+13.9 points, 95 % interval +9.0 to +18.8" in text
