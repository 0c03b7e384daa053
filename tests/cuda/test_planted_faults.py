"""Faults planted in the kernels of `looped_blocks`: what replaces what, and how the emulation notices.
docs/kernels/machinery.md has a table of them."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from loopmdm_kernels.testing import assert_matches_oracle, looped_inputs
from tests.cuda import emulated_backward, test_emulated_backward, test_emulated_kernel, test_looped_rows
from tests.cuda.planted import EARLY_COPY, EARLY_READ, Fault, choose_and_expect, plant
from tests.cuda.test_head_faults import FAULTS as HEAD

NO_FENCE = "no wgmma.fence between the use of .* and a product"
NOT_WAITED = "sums are used before the wait for their products|a thread ends before its products"
NO_PROXY_FENCE = "a bulk copy of what a thread stores, without order and proxy fence"
HIDDEN = "a product reads what a thread has stored, without proxy fence"
MISSED = "a lane may miss a round of a barrier"
HIDDEN = "a product reads what a thread has stored, without proxy fence"
UNORDERED_STORE = "two threads store to one place, in no order|a copy of what another thread stores"
UNORDERED = f"{NO_PROXY_FENCE}|{UNORDERED_STORE}|values"

# Of both kernels for Hopper, and of both for the forward pass.
SIGNALS = {
    "a signal before all warps are done": Fault(
        "ring_sm90.cuh", "meet<1>(Config::kComputeThreads);", "", f"{UNORDERED}|{MISSED}"
    ),
    "a counter that does not release": Fault(
        "ring_sm90.cuh",
        "add_release(counters + item.signal, item.signal_count);",
        "counters[item.signal] += item.signal_count;",
        UNORDERED,
    ),
    "no proxy fence before a signal": Fault("ring_sm90.cuh", "proxy_fence();", "", ""),
}
WAITS = {
    "no wait for the inputs": Fault(
        "progress.cuh", "wait_for(p.counters + item.wait + i, target);", "(void)target;", UNORDERED
    ),
    "a wait that does not acquire": Fault(
        "progress.cuh",
        "wait_for(p.counters + item.wait + i, target);",
        "emulator::wait_until([c = p.counters + item.wait + i, target] { return *c >= target; });",
        UNORDERED,
    ),
}
ALL_WAIT = "all threads wait"
OTHERS = "other threads meet at a named barrier than before"
LEFT = "threads have come to a named barrier where nobody meets them"
TURNS = {
    "a group that does not wait for its turn": Fault(
        "turns_sm90.cuh", "meet_at<kThreads>(kFirstBarrier + group_);", "", f"{OTHERS}|{LEFT}"
    ),
    "a turn that is not passed on": Fault(
        "turns_sm90.cuh", "arrive_at<kThreads>(kFirstBarrier + 1 - group_);", "", ALL_WAIT
    ),
    "a group that waits for the other one's turn": Fault(
        "turns_sm90.cuh", "meet_at<kThreads>(kFirstBarrier + group_);",
        "meet_at<kThreads>(kFirstBarrier + 1 - group_);",
        f"{OTHERS}|{ALL_WAIT}",
    ),
    "nobody's turn at the beginning": Fault("turns_sm90.cuh", "if (group_ == 1) end();", "", ALL_WAIT),
    "a turn that is passed on behind the last one": Fault(
        "turns_sm90.cuh", "if (group_ == 0) end();", "end();", f"{OTHERS}|{LEFT}"
    ),
}  # fmt: skip
FORWARD = {
    **SIGNALS,
    **WAITS,
    **TURNS,
    "no proxy fence behind the waits": Fault("loader_sm90.cuh", "proxy_fence();", "", ""),
    "no proxy fence at all": Fault(
        "ring_sm90.cuh", "proxy_fence();", "", NO_PROXY_FENCE,
        Fault("loader_sm90.cuh", "proxy_fence();", ""),
    ),
    "lanes that do not meet behind their waits": Fault(
        "progress.cuh", "wait_for(p.counters + item.wait + i, target);\n  [[__syncwarp();]]", "", ""
    ),
    "a load by way of L1": Fault(
        "rows.cuh", "load_pair(&statistics[part].mean)", "load_constant_pair(&statistics[part].mean)",
        "a load by way of L1 of what the kernel stores",
    ),
    "no fence of initialised barriers": Fault(
        "stage_ring_sm90.cuh", "barrier_init_fence();", "", "no fence behind the initialisation of a barrier"
    ),
    "no meeting behind the initialisation": Fault(
        "looped_blocks_sm90.cu", "ring.initialise();\n  [[Ring::meet_all();]]", "",
        "a barrier is used before its initialisation is known",
    ),
    "half of the threads meet": Fault(
        "ring_sm90.cuh", "meet<1>(Config::kComputeThreads);", "meet<1>(Config::kComputeThreads / 2);",
        "other threads meet at a named barrier than before",
    ),
    "more threads are to meet than there are": Fault(
        "ring_sm90.cuh", "meet<1>(Config::kComputeThreads);", "meet<1>(Config::kComputeThreads + 32);",
        "all threads wait",
    ),
    "half of a warp is to meet": Fault(
        "ring_sm90.cuh", "meet<1>(Config::kComputeThreads);", "meet<1>(Config::kComputeThreads - 16);",
        "threads name different numbers at a named barrier",
    ),
    "stages that do not begin at an atom": Fault(
        "stage_ring_sm90.cuh", "skipped = [[(1024 - address % 1024) % 1024]];", "128",
        "a box is not aligned in shared memory",
    ),
    "a lane alone ends a group of products": Fault(
        "product_sm90.cuh", "products_commit();", "if (threadIdx.x % 32 == 3) products_commit();",
        "lanes of a warp have executed different instructions|sums are used before .*",
    ),
    "threads store into an operand": Fault(
        "product_sm90.cuh", "products_begin(sums, operand);",
        "++*emulator::shared_byte(right); products_begin(sums, operand);",
        HIDDEN,
    ),
    "no wait for a stage": Fault(
        "stage_ring_sm90.cuh", "barrier_wait(full(place), place.round)", "(void)place", EARLY_READ
    ),
    "a stage filled while it is read": Fault(
        "stage_ring_sm90.cuh", "wait_together(empty(place), place.round ^ 1)", "(void)place", EARLY_COPY
    ),
    "lanes that do not meet behind a barrier": Fault(
        "stage_ring_sm90.cuh", "barrier_wait(barrier, parity);\n    [[__syncwarp();]]", "",
        f"{MISSED}|all threads wait",
    ),
    "a stage released before all lanes have read it": Fault(
        "stage_ring_sm90.cuh", "release(RingPlace place) const {\n    [[__syncwarp();]]", "", EARLY_COPY
    ),
    "the wrong half of the keys": Fault(
        "loader_sm90.cuh", "qkv_slot([[item.read_slot]]", "1 - item.read_slot"
    ),
    "a part in the place of another": Fault(
        "epilogue.cuh", "p.token([[item.part * p.batch + item.sequence]], row)", "item.sequence", UNORDERED
    ),
    "one part for all of them": Fault("row_phases.cuh", "p.partial_values + [[part * matrix]]", "0"),
    "statistics of a row before all quads have told theirs": Fault(
        "row_phases.cuh", "found.deviations);\n      [[meet<1>(Config::kComputeThreads);]]", ""
    ),
    "statistics of the next rows over those that are still read": Fault(
        "row_phases.cuh", "[[meet<1>(Config::kComputeThreads);]]\n    }\n  }\n  if (exits)", "", ""
    ),
    "a norm by the vectors of the layer before": Fault(
        "row_phases.cuh", "next.layer = [[(item.layer + 1) % Config::kLayers]]", "item.layer"
    ),
    "rows that enter without norm": Fault(
        "sequence.cuh",
        "normalise_rows<1>(p, token, 1, 1, target, p.statistics1, affine_of(p, item, 0));",
        "",
        f"values|{NO_PROXY_FENCE}",
    ),
    "a norm before all lanes have stored the row": Fault(
        "sequence.cuh", "[[__syncwarp();]]\n      normalise_rows", "", f"values|{UNORDERED_STORE}"
    ),
    "a swizzle of the wrong bits": Fault(
        "matrix_descriptor.h", "panel + [[32]] * step", "64", "an operand begins inside of an atom|values"
    ),
    "no wait for the last products": Fault("product_sm90.cuh", "products_wait<0>();", "", NOT_WAITED),
    "wait<1> for wait<0> before the sums": Fault(
        "product_sm90.cuh", "products_wait<0>();", "products_wait<1>();", NOT_WAITED
    ),
    "wait<1> for wait<0> before the scores": Fault(
        "attention_sm90.cuh", "products_wait<0>();", "products_wait<1>();", NOT_WAITED
    ),
    "no end of a group of products": Fault("attention_sm90.cuh", "products_commit();", "", NOT_WAITED),
    "a stage released before its products are done": Fault(
        "stage_ring_sm90.cuh",
        "products_wait<1>();\n    if (step > 0) ring.release(before);",
        "if (step > 0) ring.release(before);\n    products_wait<1>();",
        EARLY_COPY,
    ),
    "a left operand made again under its products": Fault(
        "product_sm90.cuh", "stage(operands[1], step + 1);", "stage(operands[0], step + 1);",
        "a left operand has changed under a product",
    ),
    "sums touched under their products": Fault(
        "product_sm90.cuh", "products_commit();", "products_commit(); sums[0] += 1;",
        "sums have changed under a product",
    ),
    "no fence before products of the stream": Fault(
        "product_sm90.cuh", "products_begin(sums, operand);", "", NO_FENCE
    ),
    "a fence without the left operand": Fault(
        "product_sm90.cuh", "products_begin(sums, operand);", "products_begin(sums);", NO_FENCE
    ),
    "no fence before products of stages": Fault(
        "stage_ring_sm90.cuh", "products_begin(sums);", "", NO_FENCE
    ),
    "no fence before products of attention": Fault(
        "attention_sm90.cuh", "products_begin(scores, queries);", "", NO_FENCE,
        Fault("attention_sm90.cuh", "products_begin(mixed, weights);", ""),
    ),
}  # fmt: skip
ADAPTIVE = {
    "progress that does not release": Fault(
        "sequence.cuh",
        "store_release(p.progress(item.sequence), goes_on ? loop + 1 : kFinal);",
        "*p.progress(item.sequence) = goes_on ? loop + 1 : kFinal;",
        "a number is read that another thread stores",
    ),
    "a count of the settled that does not release": Fault(
        "sequence.cuh", "add_release(p.settled(), 1);", "*p.settled() += 1;",
        "a number is read that another thread stores",
    ),
}  # fmt: skip
PAIRS = {
    "the last part for all of them": Fault("products.cuh", "sums[i] += own[i];", "sums[i] = own[i];"),
    "one part of a tile that has them all": Fault(
        "loader_sm90.cuh", "Config::kMlpOutInner", "Config::kMlp / Config::kMlpOutParts", ALL_WAIT
    ),
    "no wait for the inputs": WAITS["no wait for the inputs"],
    "a signal of one block for both": Fault(
        "progress.cuh", "generation([[Config::kBlocks * item.wait_count]], loop)", "item.wait_count",
        UNORDERED,
    ),
    "no proxy fence at all": FORWARD["no proxy fence at all"],
    "a stage filled while the other block reads it": Fault(
        "stage_ring_sm90.cuh",
        "barrier_arrive_at(empty(place), lane)",
        "(barrier_arrive(empty(place)), barrier_arrive(empty(place)))",
        f"{EARLY_COPY}|all threads wait",
        Fault("stage_ring_sm90.cuh", "if (lane < [[kBlocks]])", "1"),
    ),
    "half of a weight in the place of the other": Fault(
        "loader_sm90.cuh", "target + [[row_block()]] * (right / 2)", "0", f"{EARLY_COPY}|values"
    ),
    "a norm of the other block's rows": Fault(
        "row_phases.cuh", "item.column * rows + [[rank_in_tile()]] * (rows / Config::kBlocks)", "0",
        f"{UNORDERED}|two threads store to one place, in no order",
    ),
    "blocks of a pair that do not meet before the first copy": Fault(
        "looped_blocks_sm90.cu", "ring.initialise();\n  [[Ring::meet_all();]]", "",
        "a barrier is used before its initialisation is known",
    ),
    "blocks of a pair that do not meet behind the last copy": Fault(
        "looped_blocks_sm90.cu", "if (Config::kBlocks > 1) [[Ring::meet_all();]]", "",
        "shared memory of a block that has ended|a block may end while others reach into it",
    ),
}  # fmt: skip
PAIRS_OF_64 = {
    "no wait for the inputs": WAITS["no wait for the inputs"],
    "half of a weight in the place of the other": PAIRS["half of a weight in the place of the other"],
    "a group that passes by a stage too few": Fault(
        "looped_blocks_sm90.cu", "1 + keys : [[steps_of(item.phase)]];", "steps_of(item.phase) - 1",
        f"{EARLY_READ}|{EARLY_COPY}|{ALL_WAIT}|values",
    ),
    "rows of the stream in the other block's place": Fault(
        "rows.cuh", "panel_offset([[seat.row % Config::kRows]], column", "seat.row", f"{EARLY_READ}|values"
    ),
    "a box of the keys in the place of the other": Fault(
        "loader_sm90.cuh", "box([[row_block() * kBoxRows]], [](auto... where) { load_box_for", "0",
        f"{EARLY_COPY}|values",
    ),
}  # fmt: skip
FOURS = {
    "no wait for the inputs": WAITS["no wait for the inputs"],
    "a stage filled while a block of the other rows reads it": Fault(
        "stage_ring_sm90.cuh", "if (lane < [[kBlocks]])", "lane >> 1 == rank_in_cluster() >> 1 && lane < 4",
        EARLY_COPY, Fault("stage_ring_sm90.cuh", "[[kBlocks * kReaders]]);", "2 * kReaders"),
    ),
    "a stage filled while a block of the other columns reads it": Fault(
        "stage_ring_sm90.cuh", "if (lane < [[kBlocks]])", "lane % 2 == rank_in_cluster() % 2 && lane < 4",
        EARLY_COPY, Fault("stage_ring_sm90.cuh", "[[kBlocks * kReaders]]);", "2 * kReaders"),
    ),
    "half of a weight in the place of the other": PAIRS["half of a weight in the place of the other"],
    "half of the rows in the place of the other": Fault(
        "loader_sm90.cuh", "stage(place_) + [[side() * kBoxRows * 128]]", "0", f"{EARLY_COPY}|values"
    ),
    "weights for blocks of other columns": Fault(
        "loader_sm90.cuh", "[[0b101 << side()]] : 0b11", "0b11 << (2 * row_block())", f"{EARLY_COPY}|values"
    ),
    "rows for blocks of other rows": Fault(
        "loader_sm90.cuh", "[[0b11 << (2 * row_block())]]);", "0b101 << side()", f"{EARLY_COPY}|values"
    ),
    "columns of the other side": Fault(
        "config.cuh", "item.column * Config::kSides + [[side()]]", "0", UNORDERED
    ),
}  # fmt: skip
ONE_GROUP = {
    "a group that keeps what it passes by": Fault(
        "looped_blocks_sm90.cu", "ring.wait_full(place);\n    [[ring.release(place);]]\n  }", "", ALL_WAIT
    ),
    "sums of the other block's rows": Fault(
        "row_phases.cuh", "item.column * rows + [[rank_in_tile()]] * (rows / Config::kBlocks)", "0",
        f"{UNORDERED}|values",
    ),
}  # fmt: skip
SM80 = {
    **WAITS,
    "a signal before all warps are done": Fault(
        "walk_sm80.cuh", "complete() const {\n    [[__syncthreads();]]", "", UNORDERED
    ),
    "a counter that does not release": Fault(
        "walk_sm80.cuh",
        "add_release(p_.counters + item().signal, item().signal_count);",
        "p_.counters[item().signal] += item().signal_count;",
        UNORDERED,
    ),
    "threads that do not meet behind the waits": Fault(
        "walk_sm80.cuh",
        "current_->loop = loop;\n        }\n      }\n      [[__syncthreads();]]",
        "",
        f"{UNORDERED}|all threads wait",
    ),
    "a stage read before it is full": Fault(
        "stages_sm80.cuh", "copies_wait<Config::kStages - 2>();", "copies_wait<Config::kStages - 1>();"
    ),
    "a stage filled while it is read": Fault("walk_sm80.cuh", "read_all() {\n    [[__syncthreads();]]", ""),
    "a swizzle of the wrong bits": Fault(
        "product_sm80.cuh", "(lane / 8 % 2 ^ lane % 8)", "(lane / 8 % 2 ^ lane % 4)"
    ),
}
ROWS = {
    "keys over those that others still read": Fault(
        "looped_rows_sm90.cu", "Ring::wait_together(memory_.free(), (applications_ & 1) ^ 1);", "", EARLY_COPY
    ),
    "keys that are free before the means are made": Fault(
        "looped_rows_sm90.cu",
        "barrier_wait(memory_.arrived(0), parity);",
        "barrier_wait(memory_.arrived(0), parity);"
        "if (threadIdx.x < kBlocks) barrier_arrive_at(memory_.free(), threadIdx.x);",
        EARLY_COPY,
        Fault(
            "looped_rows_sm90.cu",
            "[[if (threadIdx.x < kBlocks) barrier_arrive_at(memory_.free(), threadIdx.x);]]"
            "\n    ++applications_;",
            "",
        ),
    ),
    "keys of others that are not waited for": Fault(
        "looped_rows_sm90.cu", "barrier_wait(memory_.arrived(0), parity);", "", EARLY_READ
    ),
    "values of others that are not waited for": Fault(
        "looped_rows_sm90.cu", "barrier_wait(memory_.arrived(1), parity);", "", EARLY_READ
    ),
    "values that tell that keys are there": Fault(
        "looped_rows_sm90.cu", "memory_.arrived([[kKind]])", "0", f"{EARLY_READ}|{EARLY_COPY}|{ALL_WAIT}"
    ),
    "keys that are sent before all are stored": Fault(
        "looped_rows_sm90.cu",
        "proxy_fence();\n    [[meet_all();]]\n    if (warp_ > 0) return;",
        "",
        f"{UNORDERED}|{MISSED}",
    ),
    "keys that are sent without proxy fence": Fault(
        "looped_rows_sm90.cu",
        "[[proxy_fence();]]\n    meet_all();\n    if (warp_ > 0) return;",
        "",
        NO_PROXY_FENCE,
        Fault("looped_rows_sm90.cu", "[[proxy_fence();]]\n    if (!elected()) return;", ""),
    ),
    "a block that sends nothing": Fault(
        "looped_rows_sm90.cu", "if (!elected()) return;", "if (!elected() || rank() == 1) return;", ALL_WAIT
    ),
    "values behind the last key that are not 0": Fault(
        "looped_rows_sm90.cu", "store_shared_four(behind + 16 * i, make_uint4(0, 0, 0, 0));", ""
    ),
    "scores behind the last key": Fault("rows_attention_sm90.cuh", "key < p.length", "true"),
    "weights of attention without proxy fence": Fault(
        "rows_attention_sm90.cuh", "shared_proxy_fence();", "", HIDDEN
    ),
    "weights that the group does not wait for": Fault(
        "rows_attention_sm90.cuh",
        "shared_proxy_fence();\n      [[seat_.meet_group();]]",
        "",
        f"values|{HIDDEN}|{OTHERS}|{LEFT}",
    ),
    "sums of weights of another head": Fault(
        "rows_attention_sm90.cuh",
        "sums_at(head, token, lane % 4)",
        "sums_at((head + 1) % kHeads, token, lane % 4)",
    ),
    "rows that are normalised without proxy fence": Fault(
        "looped_rows_sm90.cu",
        "    }\n    [[shared_proxy_fence();]]\n    meet_all();\n  }\n\n  __device__ uint32_t turn_at",
        "",
        HIDDEN,
    ),
    "queries that are rotated without proxy fence": Fault(
        "looped_rows_sm90.cu",
        "[[shared_proxy_fence();]]\n    meet_all();\n    const uint32_t parity",
        "",
        HIDDEN,
    ),
    "turns of the next token": Fault(
        "looped_rows_sm90.cu", "first_token() + [[seat_.token(i)]], p_", "seat_.token(0)"
    ),
    "features that are not every second eight": Fault(
        "rows_product_sm90.cuh", "kApart * (row(i) / 8)", "row(i) / 8", f"values|{UNORDERED_STORE}"
    ),
    "an activation before its product": Fault(
        "rows_product_sm90.cuh", "work([[tile - 1]], step);", "tile", f"{NOT_WAITED}|values"
    ),
    "a stage of weights that is free early": Fault(
        "rows_product_sm90.cuh", "[[products_wait<1>();]]\n      if (tile", "products_wait<2>();", EARLY_COPY
    ),
    "weights that are not waited for": Fault(
        "rows_product_sm90.cuh", "ring.wait_full(place);", "", EARLY_READ
    ),
    "sums that are read before their products": Fault(
        "rows_product_sm90.cuh", "[[products_wait<0>();]]\n  pin(sums[kTileNumber - 1]);", "", NOT_WAITED
    ),
    "a block that is gone while others send to it": Fault(
        "looped_rows_sm90.cu",
        "[[meet_in_cluster();]]  // a block that is gone",
        "",
        "shared memory of a block that has ended|a block may end while others reach into it"
        "|loads arrive after the end",
    ),
}
ROWS_ADAPTIVE = {
    "a change that is told before it is stored": Fault(
        "looped_rows_sm90.cu", "add_release(told, 1);", "*told += 1;", "values|all threads wait"
    ),
    "a change of some blocks": Fault(
        "looped_rows_sm90.cu",
        "wait_for(told, [[kBlocks * (loop + 1)]]);",
        "kBlocks * loop + 1",
        "values|all threads wait",
    ),
    "halves of a pair that are read early": Fault(
        "looped_rows_sm90.cu",
        "[[meet_all();]]\n#pragma unroll\n      for (int tile = 0; tile < kTiles; ++tile) {",
        "",
        f"values|{UNORDERED_STORE}",
    ),
    "a loader that is not told": Fault(
        "looped_rows_sm90.cu", "barrier_arrive(memory_.decided());", "", ALL_WAIT
    ),
}
BACKWARD = {
    **SIGNALS,
    "no wait for the inputs": Fault(
        "backward_loader_sm90.cuh", "wait_for(p_.counters + item.wait + i, target);", "(void)target;",
        UNORDERED,
    ),
    "lanes that do not meet behind their waits": Fault(
        "backward_loader_sm90.cuh",
        "wait_for(p_.counters + item.wait + i, target);\n    [[__syncwarp();]]",
        "",
        "",
    ),
    "no proxy fence behind the waits": Fault("backward_loader_sm90.cuh", "proxy_fence();", "", ""),
    "no proxy fence at all": Fault(
        "ring_sm90.cuh", "proxy_fence();", "", NO_PROXY_FENCE,
        Fault("backward_loader_sm90.cuh", "proxy_fence();", ""),
    ),
    "kept operands overwritten while they are read": Fault(
        "backward_loader_sm90.cuh", "Ring::wait_together(kept_.empty(), kept_place_.round ^ 1);", "",
        EARLY_COPY,
    ),
    "kept operands released before all lanes are done": Fault(
        "kept_sm90.cuh", "release() const {\n    [[__syncwarp();]]", "", ""
    ),
    "numbers of rows read before they are there": Fault(
        "backward_rows_sm90.cuh", "meet<1>(Config::kComputeThreads);", ""
    ),
    "a weight read along where it lies across": Fault(
        "looped_blocks_backward_sm90.cu",
        "shared_product<false, true>(sums, ring_, place_, seat, inner / Config::kStep);",
        "shared_product(sums, ring_, place_, seat, inner / Config::kStep);",
    ),
    "wait<1> for wait<0> before the gradients": Fault(
        "attention_backward_sm90.cuh", "products_wait<0>();", "products_wait<1>();", NOT_WAITED
    ),
    "no fence before products of attention": Fault(
        "attention_backward_sm90.cuh", "products_begin(scores, products);", "", NO_FENCE
    ),
}  # fmt: skip
BACKWARD_PAIRS = {
    "no wait for the inputs": BACKWARD["no wait for the inputs"],
    "a signal of one block for both": Fault(
        "backward_loader_sm90.cuh", "generation([[Config::kBlocks * item.wait_count]], step)",
        "item.wait_count", UNORDERED,
    ),
    "a stage filled while the other block reads it": PAIRS["a stage filled while the other block reads it"],
    "a box that both blocks of a pair load": Fault(
        "backward_loader_sm90.cuh", "panel % 2 != [[rank_in_tile()]]", "0", f"{EARLY_COPY}|all threads wait"
    ),
    "a norm of the other block's rows": Fault(
        "backward_rows_sm90.cuh", "item.column * Config::kBlocks + [[rank_in_tile()]]", "0",
        f"{UNORDERED}|two threads store to one place, in no order",
    ),
    "blocks of a pair that do not meet before the first copy": Fault(
        "looped_blocks_backward_sm90.cu", "ring.initialise();\n  }\n  [[Ring::meet_all();]]", "",
        "a barrier is used before its initialisation is known",
    ),
    "blocks of a pair that do not meet behind the last copy": Fault(
        "looped_blocks_backward_sm90.cu", "if (Config::kBlocks > 1) [[Ring::meet_all();]]", "",
        "shared memory of a block that has ended|a block may end while others reach into it",
    ),
}  # fmt: skip


class Kernel(NamedTuple):
    variant: str  # of test_emulated_kernel.py
    loops: int
    faults: dict[str, Fault]
    length: int = 40
    batch: int = 1
    exit_threshold: float | None = None


KERNELS = {
    "forward": Kernel("128 rows", 1, FORWARD, 140),  # two row tiles
    "early exit": Kernel("128 rows", 4, ADAPTIVE, 20, 2, 0.2),
    "pairs": Kernel("pairs", 1, PAIRS, 140),  # rows of both blocks
    "pairs of 64 rows": Kernel("pairs of 64 rows", 1, PAIRS_OF_64, 81),
    "fours": Kernel("fours", 1, FOURS, 81),
    "one group": Kernel("one group", 1, ONE_GROUP, 81),
    "sm80": Kernel("sm80, 64 rows", 1, SM80, 80),
}


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """A kernel with all of its faults, by its name; built once."""
    known = {}

    def build(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("planted")
            with pytest.MonkeyPatch.context() as patch:
                known[name] = build_with_faults(name, folder, patch)
        return known[name]

    return build


def build_with_faults(name, folder, patch):
    if name in BACKWARD_KERNELS:
        kernel = BACKWARD_KERNELS[name]
        plant(kernel.faults, folder, patch)
        return build_backward(kernel, folder)
    if name in ROWS_KERNELS:
        plant(ROWS_KERNELS[name].faults, folder, patch)
        return test_looped_rows.build_rows(ROWS_KERNELS[name].rows, folder, optimize=False)
    plant(KERNELS[name].faults, folder, patch)
    variant = test_emulated_kernel.VARIANTS[KERNELS[name].variant]
    return test_emulated_kernel.build(variant, folder, optimize=False)


def check_forward(built, kernel, seed):
    inputs = test_emulated_kernel.make(built.sizes, kernel.batch, kernel.length)
    oracle, exact = test_emulated_kernel.oracle, inputs.to(torch.float64)
    if kernel.exit_threshold is None:
        out, _ = built.run(inputs, kernel.loops, num_blocks=5, seed=seed)
        assert_matches_oracle(out, oracle(inputs, kernel.loops), oracle(exact, kernel.loops))
        return
    scale = torch.tensor([1e-2, 1e3])[:, None, None]  # the larger one changes little, and stops early
    inputs, exact = (given._replace(x=given.x * scale) for given in (inputs, exact))
    _, expected = oracle(exact, kernel.loops, exit_threshold=kernel.exit_threshold)
    assert expected[0] > expected[1]
    _, used = built.run(inputs, kernel.loops, exit_threshold=kernel.exit_threshold, num_blocks=5, seed=seed)
    assert torch.equal(used, expected)


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in KERNELS for fault in [None, *KERNELS[name].faults]]
)
def test_forward(builds, name, fault):
    built, kernel = builds(name), KERNELS[name]
    choose_and_expect(built.library, kernel.faults, fault, lambda seed: check_forward(built, kernel, seed))


class RowsKernel(NamedTuple):
    rows: test_looped_rows.Rows
    faults: dict[str, Fault]
    exit_threshold: float | None = None


ROWS_KERNELS = {
    "rows": RowsKernel(test_looped_rows.Rows((128, 4, 2), 66, stages=4), ROWS),
    "rows, adaptive": RowsKernel(test_looped_rows.Rows((64, 2, 2), 12), ROWS_ADAPTIVE, 0.2),
}


def check_rows(built, kernel, seed):
    inputs, oracle = built.make(2), test_emulated_kernel.oracle
    if kernel.exit_threshold is None:
        built.check(inputs, 2, clusters=1, seed=seed)
        return
    inputs = inputs._replace(x=inputs.x * torch.tensor([1e-2, 1e3])[:, None, None])
    _, expected = oracle(inputs.to(torch.float64), 4, exit_threshold=kernel.exit_threshold)
    assert expected[0] > expected[1]
    _, used = built.run(inputs, 4, exit_threshold=kernel.exit_threshold, seed=seed)
    assert torch.equal(used, expected)


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name in ROWS_KERNELS for fault in [None, *ROWS_KERNELS[name].faults]],
)
def test_rows(builds, name, fault):
    built, kernel = builds(name), ROWS_KERNELS[name]
    choose_and_expect(built.library, kernel.faults, fault, lambda seed: check_rows(built, kernel, seed))


SIZES = (128, 2)


class BackwardKernel(NamedTuple):
    rows: int
    columns: int
    faults: dict[str, Fault]
    length: int = 40


BACKWARD_KERNELS = {
    "backward": BackwardKernel(128, 64, BACKWARD),
    "backward, pairs": BackwardKernel(256, 128, BACKWARD_PAIRS, 140),  # rows of both blocks
}


def backward_inputs(length):
    return looped_inputs(1, length, *SIZES, mlp_ratio=1, num_blocks=1).to(torch.bfloat16)


def build_backward(kernel, folder):
    shape, plan = emulated_backward.plan_of(backward_inputs(kernel.length), kernel.columns, kernel.rows)
    return emulated_backward.build(shape, plan, folder, optimize=False), plan, SIZES


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name, kernel in BACKWARD_KERNELS.items() for fault in [None, *kernel.faults]],
)
def test_backward(builds, name, fault):
    variant, kernel = builds(name), BACKWARD_KERNELS[name]

    def check(seed):
        inputs = backward_inputs(kernel.length)
        test_emulated_backward.check(variant, inputs, 1, num_blocks=2, seed=seed)

    choose_and_expect(variant[0], kernel.faults, fault, check)


ALL = KERNELS, ROWS_KERNELS, BACKWARD_KERNELS


def test_the_page_has_all_faults():
    page = (Path(__file__).parents[2] / "docs/kernels/machinery.md").read_text()
    listed = set(re.findall(r"^\| (.+?) \| [^|]+ \|$", page, re.MULTILINE))
    planted = {
        fault
        for faults in (*(kernel.faults for kernels in ALL for kernel in kernels.values()), HEAD)
        for fault in faults
    }
    assert planted <= listed, planted - listed
