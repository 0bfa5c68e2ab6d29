"""Reading collectives out of a compiled program's text: each notation of XLA, by hand-written snippets with known answers."""

import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxllm.parallel import collectives
from jaxllm.parallel.collectives import Line

AXES = ("data", "fsdp", "tensor")
MESH = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def program(*lines: str, others: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_step, is_scheduled=true\n\n{others}\nENTRY %main.1 (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def gather(groups: str) -> str:
    return (
        f"%a = f32[16,4]{{1,0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true"
    )


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        # Device d is at (data, fsdp, tensor) = (d // 4, d // 2 % 2, d % 2).
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",), 2),
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor"), 4),
        ("{}", AXES, 8),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
        ("[1,8]<=[8]", AXES, 8),
        ("mesh['a'=2,'b'=4] {'a'}", ("data",), 2),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp", "tensor"), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,4,6) {'b'}", ("fsdp",), 2),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ("fsdp",), 2),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ("tensor",), 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", AXES, 8),
    ],
)
def test_axes_of_groups(groups: str, axes: tuple, size: int) -> None:
    (found,) = collectives.read(program(gather(groups)), MESH)
    assert (found.kind, found.axes, found.group, found.arrays) == ("all-gather", axes, size, (256,))


@pytest.mark.parametrize("groups", ["{{0},{1},{2},{3},{4},{5},{6},{7}}", "[8,1]<=[8]", "mesh['a'=1,'b'=8] {'a'}"])
def test_a_group_of_one_is_none(groups: str) -> None:
    assert collectives.read(program(gather(groups)), MESH) == []


GROUPS = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"


@pytest.mark.parametrize(
    ("line", "kind", "arrays", "numbers", "sent"),
    [
        (f"%a = f32[4,4]{{1,0}} reduce-scatter(%x), {GROUPS}, dimensions={{0}}, to_apply=%sum", "reduce-scatter", (128,), (), 64),
        (f"%a = bf16[4,4]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%sum", "all-reduce", (32,), (), 32),
        (
            f"%a = (f32[8]{{0}}, f32[], /*index=2*/s32[2,2]{{1,0:T(8,128)}}) all-reduce(%x, %y, %z), {GROUPS}, to_apply=%sum",
            "all-reduce",
            (32, 16),
            (4,),
            48,
        ),
        (f"%a = (f32[2,4]{{1,0}}, f32[2,4]{{1,0}}) all-to-all(%x, %y), {GROUPS}", "all-to-all", (64,), (), 32),
        (f"%a = f8e4m3fn[8]{{0}} all-to-all(%x), {GROUPS}, dimensions={{0}}", "all-to-all", (8,), (), 4),
        (f"%a = (f32[8]{{0}}, f32[16]{{0}}) all-gather-start(%x), {GROUPS}, dimensions={{0}}", "all-gather", (64,), (), 32),
        (
            f"%a = ((f32[8]{{0}}, bf16[2]{{0}}), (f32[16]{{0}}, bf16[4]{{0}})) all-gather-start(%x, %y), {GROUPS}",
            "all-gather",
            (64, 8),
            (),
            36,
        ),
        (f"%a = f32[8]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%sum", "all-reduce", (32,), (), 32),
        (f"%a = ((f32[8]{{0}}), f32[4]{{0}}) reduce-scatter-start(%x), {GROUPS}", "reduce-scatter", (32,), (), 16),
        (
            "%a = (pred[8]{0}, pred[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            (8,),
            (),
            8,
        ),
    ],
)
def test_bytes_of_each_kind(line: str, kind: str, arrays: tuple, numbers: tuple, sent: float) -> None:
    done = '%b = f32[8]{0} all-reduce-done(%a), metadata={op_name="all-reduce(x)"}'
    found = collectives.read(program(line, done), MESH)
    assert [(each.kind, each.axes, each.arrays, each.numbers) for each in found] == [(kind, ("tensor",), arrays, numbers)]
    (total,) = collectives.summary(found)
    assert total == Line(kind, ("tensor",), len(arrays), 1, sum(arrays), sent)


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [("{{0,4},{4,0},{1,5},{5,1}}", ("data",)), ("{{0,1},{1,0},{2,2}}", ("tensor",)), ("{{0,3},{1,2}}", ("fsdp", "tensor"))],
)
def test_axes_of_a_permutation(pairs: str, axes: tuple) -> None:
    line = f"%p = f32[8]{{0}} collective-permute(%x), channel_id=2, source_target_pairs={pairs}"
    (found,) = collectives.read(program(line), MESH)
    assert found.axes == axes and found.arrays == (32,) and found.group == 2 ** len(axes)


def test_loops_multiply_and_branches_are_uncertain() -> None:
    others = f"""%layer (x: f32[8]) -> f32[8] {{
  {gather("[4,2]<=[8]")}, metadata={{op_name="jit(step)/transpose(jvp())/while/body/all_gather"}}
}}

%microbatch (x: f32[8]) -> f32[8] {{
  %w = f32[8] while(%x), condition=%more, body=%layer, backend_config={{"known_trip_count":{{"n":"4"}}}}
  %b = f32[8]{{0}} all-reduce(%x), {GROUPS}, to_apply=%sum, metadata={{op_name="jit(step)/jvp(a)/psum"}}
}}

%taken (x: f32[8]) -> f32[8] {{
  %c = f32[8]{{0}} all-reduce(%x), {GROUPS}, to_apply=%sum
}}

%endless (x: f32[8]) -> f32[8] {{
  %d = f32[2]{{0}} reduce-scatter(%x), {GROUPS}, to_apply=%sum
}}

%more (x: f32[8]) -> pred[] {{
  %e = pred[] parameter(0)
}}

%other (x: f32[8]) -> f32[8] {{
  %f = f32[8]{{0}} copy(%x)
}}
"""
    text = program(
        '%u = f32[8] while(%x), condition=%more, body=%microbatch, backend_config={"known_trip_count":{"n":"3"}}',
        "%v = f32[8] conditional(%i, %x, %x), branch_computations={%taken, %other}",
        "%z = f32[8] conditional(%i, %x, %x), true_computation=%other, false_computation=%taken",
        "%y = f32[8] while(%x), condition=%more, body=%endless",
        others=others,
    )
    found = collectives.read(text, MESH)
    assert [(each.kind, each.times, each.certain, each.phase) for each in found] == [
        ("all-gather", 12, True, "backward"),
        ("all-reduce", 3, True, "forward"),
        ("all-reduce", 1, False, "update"),
        ("all-reduce", 1, False, "update"),
        ("reduce-scatter", None, True, "update"),
    ]
    assert collectives.summary(found) == [
        Line("all-gather", ("tensor",), 12, 12, 12 * 256, 6 * 256),
        Line("reduce-scatter", ("tensor",), 1, 1, 16, 8),
        Line("all-reduce", ("tensor",), 5, 5, 5 * 32, 5 * 32),
    ]


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no ENTRY computation.\n  Accepted: compiled.as_text"):
        collectives.read("all-reduce(x)")
