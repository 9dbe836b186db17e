"""No kernel lands that was never run: the committed receipt covers the kernels as they are."""

import json
from pathlib import Path

from conftest import kernel_digests

RECEIPT = Path(__file__).with_name("gpu_receipt.json")


def test_the_receipt_covers_every_kernel_as_it_is():
    receipt = json.loads(RECEIPT.read_text(encoding="utf-8"))
    assert receipt["kernels"] == kernel_digests(), "run `make test-gpu` on a machine with a GPU and commit the receipt"
    assert receipt["tests_passed"] > 0
