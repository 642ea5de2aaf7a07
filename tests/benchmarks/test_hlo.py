"""What is read off a compiled program's text."""

import pytest

from benchmarks import hlo

GROUPS = 'replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="f"}'


@pytest.mark.parametrize(
    ("line", "size"),
    [
        (f"%x = f32[3]{{0}} all-reduce(%a), channel_id=1, {GROUPS}", 12),
        (f"%x = (f32[3]{{0}}, bf16[2,2]{{1,0}}) all-reduce(%a, %b), channel_id=1, {GROUPS}", 20),
        (f"%x = (f32[3]{{0}}, bf16[2,2]{{1,0}}) all-reduce-start(%a, %b), channel_id=1, {GROUPS}", 20),
        (f"%x = ((f32[3]{{0}}), f32[3]{{0}}) all-reduce-start(%a), channel_id=1, {GROUPS}", 12),
        (f"%x = (f32[2,8]{{1,0:T(8,128)}}, f32[8,8]{{1,0:T(8,128)}}) all-gather-start(%a), channel_id=1, {GROUPS}", 256),
        (f"%x = ((bf16[8,8]{{1,0}}, f32[4]{{0}}), (bf16[2,8]{{1,0}}, f32[1]{{0}})) reduce-scatter-start(%a, %b), {GROUPS}", 36),
        ("%x = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}", 20),
        ("%x = f32[3]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add", None),  # of one device each
    ],
)
def test_bytes_are_those_of_the_results(line, size):
    text = f"ENTRY %main {{\n  {line}\n}}\n"
    assert [each.bytes for each in hlo.collectives(text)] == ([] if size is None else [size])


def test_one_that_is_overlapped_with_computation_counts_once():
    """A TPU's compiler writes its start, its parts beside other operations and its end, each with the number of its chain."""
    one = '%g = f32[8]{0} all-gather(%a), channel_id=4, replica_groups={{0,1}}, frontend_attributes={chain_id="0"}'
    other = one.replace("channel_id=4", "channel_id=5").replace('"0"', '"1"')
    text = "".join(f"%part.{place} {{\n  {line}\n}}\n" for place, line in enumerate([one, one, other, one]))
    assert [each.bytes for each in hlo.collectives(text)] == [32, 32]


LOOP = """\
%body {
  %g = f32[8]{0} all-gather(%a), channel_id=4, replica_groups={{0,1}}
}
%condition (p: (s32[], f32[4])) -> pred[] {
  %other = s32[]{:T(128)} constant(7)
  %steps = s32[]{:T(128)} constant(48)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %steps), direction=LT, metadata={op_name="while/cond/lt"}
}
ENTRY %main (a: f32[4]) -> f32[8] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body KNOWN
}
"""


@pytest.mark.parametrize(("known", "runs"), [("", 48), (', backend_config={"known_trip_count":{"n":"3"}}', 3)])
def test_a_collective_in_a_loop_is_received_as_often_as_the_loop_runs(known, runs):
    """XLA writes the number for a CPU and a GPU; of a TPU's program it is in the condition."""
    text = LOOP.replace(" KNOWN", known)
    assert [(each.runs, each.in_loop) for each in hlo.collectives(text)] == [(runs, True)]
    assert hlo.bytes_received(text) == {"all-gather": 32 * runs}
    if not known:
        assert hlo.bytes_received(text.replace("direction=LT", "direction=NE")) == {"all-gather": 32}  # not known


def test_a_reduce_scatter_of_a_tpu_is_none_of_whole_gradients():
    """It is a fusion: an all-reduce of which each device slices its part, and holds no more of."""
    text = """\
%all-reduce-scatter.1 (a: f32[64,8], b: bf16[8]) -> (f32[16,8], bf16[2]) {
  %r = (f32[64,8]{1,0}, bf16[8]{0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}
ENTRY %main (a: f32[64,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0} all-reduce(%a), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    assert hlo.bytes_received(text) == {"reduce-scatter": 4 * 16 * 8 + 2 * 2, "all-reduce": 4 * 64 * 8}
