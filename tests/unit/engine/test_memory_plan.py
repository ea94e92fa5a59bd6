"""The plan's arithmetic, against figures computed by hand, and the paper's tables."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from lomo_core.config import OptimizerName
from lomo_core.memory.paper import activations_of_2023, activations_today, table1, table2
from lomo_core.memory.plan import optimizer_bytes, plan
from lomo_core.memory.process import Calibration, added_bytes, holes_bytes, process_peak_bytes
from tests.support.shapes_by_hand import BEFORE_BLOCKS, BLOCK, LAYERS, LOMO, VOCAB, H, X, shapes_by_hand


def test_parameters_and_buffers() -> None:
    found = plan(shapes_by_hand(), LOMO)
    assert found.parameters_bytes == 4 * (2 * VOCAB * H + LAYERS * BLOCK + H)
    # Scratch of the update in fp32: one block of 2^18 numbers.
    assert found.buffers_bytes == 16 + 4 * 2**18


def test_activations_are_what_the_forward_pass_leaves() -> None:
    # The trained tokens' hidden states, targets and log-sum-exp.
    head = 10 * (X + 8 + 4)
    # The last norm keeps its input.
    after = BEFORE_BLOCKS + LAYERS * 10 * 100 + 10 * X + head
    assert plan(shapes_by_hand(), LOMO).activations_bytes == after
    checkpointed = replace(LOMO, activation_checkpointing=True)
    assert plan(shapes_by_hand(), checkpointed).activations_bytes == after - LAYERS * 10 * (100 - X)


def test_the_last_blocks_backward_has_the_most_beside_it() -> None:
    phases = {phase.name: phase for phase in plan(shapes_by_hand(), LOMO).phases}
    # The first block's activations, the last block at its peak, one matrix' gradient (within the trace).
    assert phases["backward"].bytes == BEFORE_BLOCKS + 10 * 100 + 10 * 150 + 4 * H * H
    assert phases["backward"].gradients_bytes == 4 * H * H


def test_a_second_backward_pass_keeps_the_whole_graph() -> None:
    once = {phase.name: phase for phase in plan(shapes_by_hand(), LOMO).phases}
    twice = plan(shapes_by_hand(), replace(LOMO, norm="second_backward"))
    backward = next(phase for phase in twice.phases if phase.name == "backward")
    assert backward.bytes == twice.activations_bytes - 10 * 100 + 10 * 150 + 4 * H * H
    assert backward.bytes > once["backward"].bytes


def test_a_tied_weight_waits_in_rows_under_lomo_and_whole_under_adalomo() -> None:
    shapes = shapes_by_hand(is_tied=True)
    in_rows = plan(shapes, LOMO)
    backward = next(phase for phase in in_rows.phases if phase.name == "backward")
    assert backward.gradients_bytes == 4 * H * H + 10 * H * 4  # at most a row per token
    whole = plan(shapes, replace(LOMO, optimizer="adalomo"))
    backward = next(phase for phase in whole.phases if phase.name == "backward")
    assert backward.gradients_bytes == 4 * H * H + VOCAB * H * 4


@pytest.mark.parametrize(
    ("optimizer", "num_bytes"),
    [
        ("lomo", 0),
        ("sgd", 0),
        ("adamw", 2 * 4 * (2 * VOCAB * H + LAYERS * BLOCK + H)),
        # m + n for a matrix, n for a vector, in fp32.
        ("adalomo", 4 * (2 * (VOCAB + H) + 2 * LAYERS * 2 * H + (LAYERS + 1) * H)),
    ],
)
def test_optimizer_states(optimizer: OptimizerName, num_bytes: int) -> None:
    assert optimizer_bytes(shapes_by_hand(), replace(LOMO, optimizer=optimizer)) == num_bytes


def test_the_baselines_hold_every_gradient() -> None:
    shapes = shapes_by_hand()
    num_bytes = 4 * shapes.num_parameters
    found = plan(shapes, replace(LOMO, optimizer="adamw"))
    assert found.gradients_bytes == num_bytes
    update = next(phase for phase in found.phases if phase.name == "update")
    # torch's AdamW, tensor by tensor: the root of the second moment and a quotient.
    assert update.bytes == num_bytes + 2 * VOCAB * H * 4


def test_ranks_share_weights_and_states() -> None:
    alone, shared = plan(shapes_by_hand(), LOMO), plan(shapes_by_hand(), replace(LOMO, num_ranks=2))
    gathered = max(2 * BLOCK, 2 * VOCAB * H + H) * 4
    assert shared.parameters_bytes == alone.parameters_bytes // 2 + gathered


def test_a_spilled_gradient_is_on_the_host() -> None:
    found = plan(shapes_by_hand(), replace(LOMO, norm="spill_memory"))
    assert found.host_bytes == 4 * shapes_by_hand().num_parameters
    assert plan(shapes_by_hand(), LOMO).host_bytes == 0


def test_an_attention_that_was_not_traced_is_an_error() -> None:
    with pytest.raises(ValueError, match="not traced with eager"):
        plan(shapes_by_hand(), replace(LOMO, attention="eager"))


def test_planning_takes_no_torch() -> None:
    code = "import sys, lomo_core.memory.paper as paper; paper.table1(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_table_1_of_the_paper() -> None:
    cells = table1()
    assert len(cells) == 6 * 5
    for cell in cells:
        error = abs(cell.plan_gib - cell.paper_gib) / cell.paper_gib if cell.paper_gib else cell.plan_gib
        if cell.category in ("parameters", "gradients", "optimizer"):
            assert error <= 0.01, cell
        elif cell.activation_checkpointing:
            assert error <= (0.05 if cell.category == "total" else 0.1), cell


def test_activations_without_checkpointing_have_shrunk_since_2023() -> None:
    today = activations_today()
    then = activations_of_2023(8, 512) / 2**30
    assert today["sdpa"] < today["eager"] < then
    # 40.75 units of 32 MiB per block, and the head: the derivation in its docstring.
    assert then == pytest.approx(32 * 40.75 / 32 + 5 / 32 + 2 * 8 * 512 * 32000 * 2 / 2**30, rel=1e-6)


def test_table_2_of_the_paper_fits_its_cards() -> None:
    rows = table2()
    assert [row.model for row in rows] == ["7B", "13B", "30B", "65B"]
    assert all(row.fits for row in rows)
    assert all(abs(row.plan_gib / row.paper_gib - 1) < 0.15 for row in rows)


def test_one_row_that_needs_a_mask_goes_by_the_traces_with_masks() -> None:
    assert LOMO.rows == "one"
    assert replace(LOMO, masks_one_row=True).rows == "padded"
    assert replace(LOMO, batch_size=2).rows == "padded"
    assert replace(LOMO, batch_size=2, is_padded=False, masks_one_row=True).rows == "equal"


def test_a_baseline_walks_no_graph_twice() -> None:
    adamw = replace(LOMO, optimizer="adamw")
    assert plan(shapes_by_hand(), replace(adamw, norm="second_backward")) == plan(shapes_by_hand(), adamw)


def test_what_is_put_aside_on_a_cpu_host_is_in_its_process() -> None:
    found = plan(shapes_by_hand(), replace(LOMO, norm="spill_memory"))
    host = Calibration(base_bytes=100, libraries_bytes=10)
    assert added_bytes(found, host) == 110 + holes_bytes(found) + 4 * shapes_by_hand().num_parameters
    assert process_peak_bytes(found, host) == added_bytes(found, host) + found.peak_bytes
