"""What `make aot` reads off the compilers' reports, and what it lets pass; the table in docs/kernels.md is its results'."""

import json

from seqmodels.training.flops import Kernel
from tools.aot import __main__ as aot
from tools.aot import reports
from tools.pages import kernels

KNOWN = [Kernel("body", False, 8.0), Kernel("body", True, 16.0)]
PTXAS = """ptxas warning : Registers are spilled in function 'x', {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
    {spills} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used 134 registers, used 2 barriers, 1 bytes smem
"""


def test_a_gpus_reports(tmp_path):
    for index, spills in ((12, 0), (9, 40)):  # counted through the process, and as numbers: 9 comes first
        (tmp_path / f"body_{index}.ptxas").write_text(PTXAS.format(spills=spills))
        (tmp_path / f"body_{index}.resources.txt").write_text("Resources(smem_scratch_bytes=4096, tmem_scratch_cols=0)")
        (tmp_path / f"body_{index}.ptx").write_text("wgmma.mma_async.sync;\nwgmma.mma_async.sync;\n")
    forward, backward = reports.of_gpu(tmp_path, KNOWN)
    assert forward == {
        "name": "forward", "flops": 8.0, "memory_bytes": 4096, "registers": 134, "spills": 80, "matrix_instructions": 2,
    }  # fmt: skip
    assert (backward["name"], backward["flops"], backward["spills"]) == ("backward", 16.0, 0)


def test_a_named_kernel(tmp_path):
    for path in ("walk_0.ptxas", "walk_0.resources.txt", "walk_0.ptx"):
        (tmp_path / path).write_text(PTXAS.format(spills=0) + "smem_scratch_bytes=4096")
    (found,) = reports.of_gpu(tmp_path, [Kernel("walk", True, 8.0)])
    assert found["name"] == "backward: walk"


UTILISATION = """== CAPACITY:
MXU, VALU, VSTORE, VSTORE:SPILL
  4     4     1     1
== UTILIZATION:
2 0 0 0
4 1 1 1
0 0 0 1
"""
BUNDLES = """= control target key start
     0   :  { %s1 = smov }
   0x1 LB: > { %v1 = vld }
   0x2   : > { %v2 = vadd }
   0xa PB: > { vst }
"""


def test_a_tpus_reports(tmp_path):
    program = ""
    for name, way in (("jvp__.1", "jvp"), ("jvp__.3", "transpose(jvp")):
        program += (
            f'  %{name} = (f32[8]) custom-call(%x), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/{way}'
            '())/pallas_call"}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","size":"2048"}]}\n'
        )
        (tmp_path / f"17-{name}-00-final_hlo-static-per-bundle-utilization.txt").write_text(UTILISATION)
        (tmp_path / f"17-{name}-01-schedule-analysis_final_bundles.txt").write_text("")
        (tmp_path / f"17-{name}-02-final_bundles.txt").write_text(BUNDLES)
    forward, backward = reports.of_tpu(program, tmp_path, KNOWN)
    assert forward == {
        "name": "forward", "flops": 8.0, "memory_bytes": 2048, "bundles": 10, "matrix_instructions": 6, "spills": 2,
    }  # fmt: skip
    assert (backward["name"], backward["flops"]) == ("backward", 16.0)


def test_what_is_a_fault():
    good = {"name": "forward", "flops": 8.0, "memory_bytes": 4096, "registers": 134, "spills": 0, "matrix_instructions": 2}

    def faults(case="decay per channel", chip="sm_90a", **changes):
        result = {"case": case, "chip": chip, "kind": "op", "kernels": [good | changes]}
        return aot.find_faults(result)

    assert not faults()
    assert "spills 8" in faults(case="selective scan", spills=8)[0]
    assert not faults(case="delta rule", spills=4_096) and "spills 4097" in faults(case="delta rule", spills=4_097)[0]
    assert not faults(spills=2_048) and "spills 2049" in faults(spills=2_049)[0]
    assert "on chip" in faults(memory_bytes=232_449)[0]
    assert "matrix unit" in faults(matrix_instructions=0)[0]
    assert not faults(case="selective scan", matrix_instructions=0)
    find = aot.find_faults
    assert "layout" in find({"case": "gla", "chip": "v5e", "error": "layout"})[0]
    step = {"case": "gla", "chip": "v5e", "kind": "step"}
    assert "without a kernel" in find(step | {"num_kernels": 0})[0] and not find(step | {"num_kernels": 8})
    missing = {"case": "softmax attention", "kind": "op", "lacks": "a reason"}
    assert "should be a kernel" in find(missing | {"chip": "v6e"})[0] and not find(missing | {"chip": "sm_90a"})


def test_the_table_is_current():
    assert kernels.page(json.loads(kernels.RESULTS.read_text())) == kernels.PAGE.read_text(), "run make aot"


def test_an_update_keeps_the_other_results():
    first, second = list(aot.CASES)[:2]
    old = [{"case": name, "chip": chip, "seconds": 1} for name in (first, second) for chip in ("v5e", "sm_90a")]
    found = aot.updated(
        {"date": "old", "results": old}, {"date": "new", "results": [{"case": second, "chip": "v5e", "seconds": 2}]}
    )
    assert found["date"] == "new"
    assert [(each["case"], each["chip"], each["seconds"]) for each in found["results"]] == [
        (first, "v5e", 1), (first, "sm_90a", 1), (second, "v5e", 2), (second, "sm_90a", 1)
    ]  # fmt: skip
