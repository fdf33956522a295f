# SPDX-License-Identifier: Apache-2.0
"""tools/sass.py: control words, the path that is taken, and how many loads are under way on it."""

import pytest

from tools import sass

# nvcc 13.0, nvdisasm 13.5 -hex -c -gi, for sm_90a
RECORDED = """//--------------------- .text._Z11copy_kernelPKfPfi --------------------------
	.section	.text._Z11copy_kernelPKfPfi,"ax",@progbits
.text._Z11copy_kernelPKfPfi:
	//## File "/somewhere/csrc/cuda/ptx.cuh", line 98 inlined at "/somewhere/csrc/cuda/tile.cuh", line 70
	//## File "/somewhere/csrc/cuda/tile.cuh", line 70 inlined at "/somewhere/csrc/cuda/lora/portable.cu", line 12
	//## File "/somewhere/csrc/cuda/lora/portable.cu", line 12
        /*0020*/                   LDC R0, c[0x0][0x220] ;                      /* 0x00008800ff007b82 */
                                                                                /* 0x000e240000000800 */
        /*0030*/                   ISETP.GE.AND P0, PT, R3, R0, PT ;            /* 0x000000000300720c */
                                                                                /* 0x001fda0003f06270 */
.L_x_9:
        /*00c0*/              @!P1 BRA `(.L_x_9) ;                              /* 0x0000000000549947 */
                                                                                /* 0x000fea0003800000 */
"""


def test_control_words_lines_and_labels_are_read():
    (code,) = sass.parse(RECORDED).values()
    load, compare, branch = code.instructions
    assert (load.op, load.stall, load.sets, load.waits) == ("LDC", 2, 0, 0)
    assert (compare.op, compare.stall, compare.sets, compare.waits) == ("ISETP.GE.AND", 13, 7, 1)
    assert (branch.predicate, branch.target) == ("@!P1", ".L_x_9") and code.labels[".L_x_9"] == 2
    assert load.line == ("cuda/tile.cuh", 70)


def listing(*rows: str) -> sass.Code:
    """A kernel from rows of `LABEL:` or `[line] [@P] OP operands | w(aits) 0 2 | s(ets) 1`."""
    text = [".text.k:"]
    for row in rows:
        if row.endswith(":"):
            text.append(f".L_x_{row}")
            continue
        said, *notes = (part.strip() for part in row.split("|"))
        if said[0].isdigit():
            number, _, said = said.partition(" ")
            text.append(f'//## File "/a/b/c.cu", line {number}')
        control = 1 | 7 << 5 | 7 << 8
        for note in notes:
            kind, *values = note.split()
            if kind == "s":
                control = control & ~(7 << 5) | int(values[0]) << 5
            else:
                control |= sum(1 << int(v) for v in values) << 11
        text += [f"/*0000*/ {said} ; /* 0x{0:016x} */", f"/* 0x{control << 41:016x} */"]
    (code,) = sass.parse("\n".join(text)).values()
    return code


def flight(code: sass.Code, trips: float = 8) -> float:
    path = sass.hot_path(code)
    for loop in path.loops():
        loop.trips = trips
    return sass.in_flight(path, sass.feeding(path))


def loop_of(*body: str) -> sass.Code:
    return listing("A:", *body, "@P0 BRA `(.L_x_A)", "EXIT")


LOAD = "LDG.E.128 R{r}, [R2.64] | s {s}"
STORE = "STS.128 [R9], R{r} | w {s}"


def test_loads_that_are_waited_for_at_once_fly_alone():
    serial = [row.format(r=8 + 4 * i, s=i) for i in range(4) for row in (LOAD, STORE)]
    together = [LOAD.format(r=8 + 4 * i, s=i) for i in range(4)] + [STORE.format(r=8 + 4 * i, s=i) for i in range(4)]
    assert flight(loop_of(*serial)) == 512
    assert flight(loop_of(*together)) == 4 * 512


def test_loads_of_the_next_trip_fly_beside_this_ones_work():
    """Two stages: what is loaded is stored a trip later, so that two trips' loads are under way at a time."""
    ahead = loop_of(STORE.format(r=8, s=0), LOAD.format(r=8, s=0), STORE.format(r=12, s=1), LOAD.format(r=12, s=1))
    assert flight(ahead, 64) == pytest.approx(2 * 512, rel=0.05)


def test_an_index_is_no_load_that_counts():
    """An address feeds no product: its bytes are not counted, though what hangs on it is."""
    code = loop_of("LDG.E.64 R2, [R30.64] | s 0", "LDG.E.128 R8, [R2.64] | w 0 | s 1", "STS.128 [R9], R8 | w 1")
    assert flight(code) == 512


def test_single_elements_beside_vectors_do_not_count():
    code = loop_of("LDG.E R2, [R30.64] | s 0", "STS [R9], R2 | w 0", LOAD.format(r=8, s=1), STORE.format(r=8, s=1))
    assert flight(code) == 512
    assert flight(loop_of("LDG.E R2, [R30.64] | s 0", "STS [R9], R2 | w 0")) == 128


def test_the_path_takes_the_vector_and_passes_by_what_is_slow():
    code = listing(
        "@P0 BRA `(.L_x_VECTOR)",
        *(f"@P1 LDG.E.U16 R{8 + i}, [R2.64] | s 0" for i in range(8)),
        "BRA `(.L_x_JOIN)",
        "VECTOR:",
        "LDG.E.128 R8, [R2.64] | s 0",
        "JOIN:",
        "@!P2 BRA `(.L_x_STORE)",  # past a mask that moves nothing
        *("IMAD.HI.U32 R20, R20, R21, RZ" for _ in range(9)),
        "STORE:",
        "STS.128 [R4], R8 | w 0",
        "EXIT",
    )
    path = sass.hot_path(code)
    assert [x.name for x in path.items] == ["BRA", "LDG", "BRA", "STS", "EXIT"]


def test_a_register_that_is_zeroed_is_no_multiplication():
    """nvcc zeroes in the multipliers' pipe too: the way element by element does not multiply more than the vector's for that."""
    code = listing(
        "@P0 BRA `(.L_x_VECTOR)",
        "HFMA2.MMA R11, -RZ, RZ, 0, 0",
        *(f"@P1 LDG.E R{8 + i}, [R2.64] | s 0" for i in range(4)),
        "BRA `(.L_x_JOIN)",
        "VECTOR:",
        "LDG.E.128 R8, [R2.64] | s 0",
        "JOIN:",
        "STS.128 [R4], R8 | w 0",
        "EXIT",
    )
    assert [x.op for x in sass.hot_path(code).items if x.name == "LDG"] == ["LDG.E.128"]
    constant, product = listing("HFMA2 R8, -RZ, RZ, 1.875, 0", "HFMA2 R8, R9, R10, R11").instructions
    assert product.multiplies and not constant.multiplies


def test_lines_that_never_run_are_passed_by():
    """Of two ways the one that moves more is taken, but for what is known not to run; a predicated access is left out."""
    code = listing(
        "@P0 BRA `(.L_x_B)",
        "7 LDG.E.128 R8, [R2.64] | s 0",
        "BRA `(.L_x_C)",
        "B:",
        "8 LDG.E R8, [R2.64] | s 0",
        "C:",
        "9 @P1 LDG.E R9, [R4.64] | s 1",
        "10 STG.E [R6.64], R8 | w 0",
        "EXIT",
    )
    lines = lambda *cold: [
        x.line[1] for x in sass.hot_path(code, lambda x: x.line and x.line[1] in cold).items if x.bytes
    ]
    assert lines() == [7, 9, 10]
    assert lines(7) == [8, 9, 10]
    assert lines(7, 9) == [8, 10]


def test_loops_inside_loops_are_counted_by_their_trips():
    code = listing("MOV R1, RZ", "A:", "IADD R1, R1, 0x1", "B:", *("FFMA R4, R5, R6, R4",) * 3, "@P0 BRA `(.L_x_B)",
                   "@P1 BRA `(.L_x_A)", "EXIT")  # fmt: skip
    path = sass.hot_path(code)
    inner, outer = path.loops()
    inner.trips, outer.trips = 10, 5
    assert path.count(lambda x: x.name == "FFMA") == 150
    assert path.count(lambda x: 1) == 1 + 5 * (1 + 10 * 4 + 1) + 1


def test_a_block_out_of_line_is_a_part_of_its_loop():
    """Cold code that nvcc puts behind the end and that branches back is no loop of its own."""
    code = listing("A:", "@P2 BRA `(.L_x_COLD)", "BACK:", "LDG.E.128 R8, [R2.64] | s 0", "STS.128 [R4], R8 | w 0",
                   "@P0 BRA `(.L_x_A)", "EXIT", "COLD:", "MOV R9, RZ", "BRA `(.L_x_BACK)")  # fmt: skip
    (loop,) = sass.hot_path(code).loops()
    assert [x.name for x in loop.items] == ["BRA", "LDG", "STS", "BRA"]


def test_asynchronous_copies_are_waited_for_by_group():
    body = ["LDGSTS.E.BYPASS.128 [R4], [R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x{n}"]
    code = [loop_of(*(row.format(n=n) for row in body)) for n in range(3)]
    path = [sass.hot_path(c) for c in code]
    for p in path:
        p.loops()[0].trips = 60
    alone, two, three = (sass.cycles(p, lambda x: 600 if x.name == "LDGSTS" else 0) for p in path)
    assert alone / two == pytest.approx(2, rel=0.1) and alone / three == pytest.approx(3, rel=0.1)
