"""The plan: a choice of experts -> the orders in which the projections work. Nothing visits the host.

NOTE [Counting sort]
    The routing plan is three stable sorts of every side: the routes by expert, the (token, head) rows by the set of experts that
    they chose, the tokens by their signature (sets.py says what these are for). Keys are few, so all sorts are counted, in the
    same three launches: how often each key occurs in each chunk of tokens; the sums over the chunks before each; each item's
    place, which is where its key begins, what the earlier chunks hold of it, and its rank among its like in the chunk. The last
    launch also writes what sets.py wants to know of each tile. Two launches with large chunks, in which every program adds up the
    counts of all chunks itself, need so many registers that they took twice the time.
    A set's key is its rank in the revolving-door order (Knuth, The Art of Computer Programming 4A, 7.2.1.3, algorithm R), in
    which neighbours differ in one expert. A signature's digits are the ranks of the heads, and a digit runs backwards where the
    digits before it make an odd number (reflected Gray code), so neighbouring signatures differ in one expert too. Signatures
    are divided until MAX_SIGNATURES are left. For 4 heads, 2 of 4 experts and N = 32768, a tile of 64 tokens then holds 10.1
    different experts of all heads in the mean, of 128 tokens 10.7; lexicographic ranks in full give 10.6 and 11.3. An
    order of the last two heads' sets that was found by annealing takes a hundredth off.

NOTE [Ranks]
    An item's rank among its like in the chunk is how many of the earlier items have its key: a sum along a row for each expert,
    comparisons of items with items for sets and signatures. On an H200 (N = 32768, two sides, a graph) the plan takes 21.5 us
    for H 4, E 4, TOP_K 2, 24 for H 4, E 10, TOP_K 2, and 28 for H 2, E 8, TOP_K 4. With a row for each set too: 22, 44 and 43
    (the last two by 16 rows). By 16 rows 24, 26 and 28; with four warps too, 31, 33 and 29, and chunks of 128 tokens 28, 30
    and 29. Ranks made by the first launch, so that the last only adds, took the first from 5 to 19 us and more (by comparisons,
    products with a triangular matrix, sums of packed counters), and left 10 of the last. Counts at the end of the gate's own
    launch made that 4 us longer, and all together 1 us shorter. For one side of H 8, E 4, TOP_K 2 the three launches take 5, 3
    and 12.4 us. The last with a word of 8-bit counters for each (token, head), scanned over the tokens, in place of rows and
    comparisons, and a third as many programs: 13.5 to 14.9, with 2 to 8 warps and chunks of 32 to 128 tokens up to 22; for E 10
    16.8 to 29 where it takes 15.7. Of that, the routes alone took 14.2, whose 2^19 places are scattered either in `order` or in
    `rank`: a quarter of the routes, without `rank`, takes 4.
    With 65 to 128 experts a row each would be too many: a chunk of ROUTES routes is compared with itself. E 128, TOP_K 8: 24 us,
    by torch.sort 38 in 15 launches; chunks of 64 and 256 routes 37 and 32; E 387, TOP_K 16: 57 and 59, so that is sorted.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import sets
from ..common import cdiv, launch, next_power_of_2, opaque
from ..sets import _lowest

MAX_SIGNATURES = 512
MAX_COUNTED = 64  # experts of all heads, for a row each
MAX_COMPARED, MAX_ROUTES = 128, 1 << 19  # experts of all heads, and routes, for comparisons of routes with routes
CHUNK, ROWS = 64, 8  # tokens of a side that a program of the plan takes, and how many experts
ROUTES = 128  # that a program takes where they are compared


class Plan(NamedTuple):
    """The orders of one side's routes r = (n*H + h)*TOP_K + j, int32.

    order: [N*H*TOP_K], the routes sorted by expert h*E + e and then by themselves; offsets: [H*E + 1], where each expert's begin;
    rank: [N*H*TOP_K], each route's place in that order. set_order: [N*H], the rows n*H + h sorted by head and chosen set;
    set_tiles: [tiles, 3 + TOP_K], of each tile of a set its first row in that order, the end of its set, its head and experts;
    token_order: [N], the tokens sorted by the sets of all heads; visited: [tiles, 2] int64, of each tile of tokens (or of rows
    of a head) its experts, a bit each, and the number of its first block of packed rows (sets.py). rank and token_order are
    empty where heads go one by one, all but the first two where nobody needs them.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    rank: torch.Tensor
    set_order: torch.Tensor
    set_tiles: torch.Tensor
    token_order: torch.Tensor
    visited: torch.Tensor


@triton.jit
def _binomial(n, k: tl.constexpr):
    """C(n, k) for small k."""
    c = n * 0 + 1
    for i in tl.static_range(k):
        c = c * (n - i) // (i + 1)
    return c


@triton.jit
def _set_rank(experts_ptrs, mask, TOP_K: tl.constexpr, SETS: tl.constexpr):
    """The rank of each set of TOP_K experts in the revolving-door order."""
    rank = tl.zeros(mask.shape, tl.int32) - TOP_K % 2
    for j in tl.static_range(TOP_K):
        e = tl.load(experts_ptrs + j, mask=mask, other=0)
        smaller = tl.zeros(mask.shape, tl.int32)
        for i in tl.static_range(TOP_K):
            smaller += (tl.load(experts_ptrs + i, mask=mask, other=0) < e).to(tl.int32)
        for i in tl.static_range(TOP_K):
            term = _binomial(e + 1, i + 1) * (1 - (TOP_K - 1 - i) % 2 * 2)
            rank += tl.where(smaller == i, term, 0)
    return tl.minimum(tl.maximum(rank, 0), SETS - 1)  # experts by hand may repeat


@triton.jit
def _plan_count_kernel(
    experts_ptr, keys_ptr, counts_ptr, N, chunks,
    BY_SETS: tl.constexpr, JOINT: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr,
    SORTED_HEADS: tl.constexpr, DIVISOR: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """counts[side, chunk]: how many of the chunk's items have each key; keys[side]: set ranks [N, H], then signatures [N]."""
    route_blocks: tl.constexpr = (H * E + ROWS - 1) // ROWS
    problems: tl.constexpr = route_blocks + 1 if BY_SETS else route_blocks
    chunk = tl.program_id(0) // problems % chunks
    problem = tl.program_id(0) % problems
    side = (tl.program_id(0) // problems // chunks).to(tl.int64)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = n < N
    experts_ptr += side * N * (H * TOP_K)
    counts_ptr += (side * chunks + chunk) * COLUMNS
    if problem < route_blocks:
        row = problem * ROWS + tl.arange(0, ROWS)
        mask_row = row < H * E
        count = tl.zeros((ROWS, CHUNK), tl.int32)
        for j in tl.static_range(TOP_K):
            e_ptrs = experts_ptr + (n[None, :] * H + (row // E)[:, None]) * TOP_K + j
            e = tl.load(e_ptrs, mask=mask_row[:, None] & mask[None, :], other=-1)
            count += (e == (row % E)[:, None]).to(tl.int32)
        tl.store(counts_ptr + row, tl.sum(count, axis=1), mask=mask_row)
    elif BY_SETS:
        keys_ptr += side * N * (H + 1)
        for column in tl.static_range(H * E, COLUMNS, 128):
            offs_k = column + tl.arange(0, 128)
            tl.store(counts_ptr + offs_k, tl.zeros((128,), tl.int32), mask=offs_k < COLUMNS)
        tl.debug_barrier()
        h = tl.arange(0, BLOCK_H)[None, :]
        item = n[:, None] * H + h
        mask_h = mask[:, None] & (h < H)
        rank = _set_rank(experts_ptr + item * TOP_K, mask_h, TOP_K, SETS)
        tl.store(keys_ptr + item, rank, mask=mask_h)
        tl.atomic_add(counts_ptr + H * E + h * SETS + rank, 1, mask=mask_h, sem="relaxed")
        if JOINT:
            signature = tl.zeros((CHUNK,), tl.int32)
            for i in tl.static_range(SORTED_HEADS):
                digit = tl.sum(tl.where(h == i, rank, 0), axis=1)
                signature = signature * SETS + tl.where(signature % 2 == 1, SETS - 1 - digit, digit)
            signature = signature // DIVISOR
            tl.store(keys_ptr + N * H + n, signature, mask=mask)
            tl.atomic_add(counts_ptr + H * (E + SETS) + signature, 1, mask=mask, sem="relaxed")


@triton.jit
def _plan_sum_kernel(
    counts_ptr, totals_ptr, visited_ptr, N, chunks,
    JOINT: tl.constexpr, HE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each count becomes the sum of the chunks before its own; totals[side] are the sums of all.

    JOINT: visited[side] is made ready for `_plan_place_kernel`: no experts yet, and each tile's first block of packed rows."""
    blocks: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    side = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < COLUMNS
    total = tl.zeros((BLOCK_K,), tl.int32)
    for c in range(0, chunks, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask = (offs_c < chunks)[:, None] & mask_k[None, :]
        ptrs = counts_ptr + (side * chunks + offs_c)[:, None] * COLUMNS + offs_k[None, :]
        count = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, axis=0)
    tl.store(totals_ptr + side * COLUMNS + offs_k, total, mask=mask_k)
    if JOINT:
        tiles = (N + TILE - 1) // TILE
        for t in range(block * BLOCK_C, tiles, blocks * BLOCK_C):
            tile = t + tl.arange(0, BLOCK_C)
            visited_ptrs = visited_ptr + (side * tiles + tile) * 2
            tl.store(visited_ptrs, tile.to(tl.int64) * 0, mask=tile < tiles)
            tl.store(visited_ptrs + 1, tile.to(tl.int64) * HE, mask=tile < tiles)


@triton.jit
def _first_place(totals_ptr, row, KEYS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Where the items of key `row` begin."""
    offs_k = tl.arange(0, BLOCK_KEYS)
    total = tl.load(totals_ptr + offs_k, mask=offs_k < KEYS, other=0)
    return tl.sum(tl.where(offs_k[None, :] < row[:, None], total[None, :], 0), axis=1)


@triton.jit
def _place(key, mask, counts_ptr, totals_ptr, KEYS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Of a chunk's items: where their key begins, and how many earlier ones have it, in the chunks before and in this."""
    offs_k = tl.arange(0, BLOCK_KEYS)
    total = tl.load(totals_ptr + offs_k, mask=offs_k < KEYS, other=0)
    before = tl.load(counts_ptr + key, mask=mask, other=0)
    size: tl.constexpr = key.shape[0]
    offs = tl.arange(0, size)
    # Of the same key and earlier: key * size + place is from key * size to less than the item's own, in one comparison.
    apart = (key * size + offs)[:, None] - (key * size)[None, :]
    earlier = apart.to(tl.uint32, bitcast=True) < offs.to(tl.uint32)[None, :]
    return tl.gather(tl.cumsum(total, 0) - total, key, 0) + before + tl.sum(earlier.to(tl.int32), axis=0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _tables(
    totals_ptr, set_tiles_ptr, visited_ptr, N, program, programs, set_tiles,
    JOINT: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of set_tiles the i-th tiles of all sets and, unless JOINT, of visited those of all heads; i is program, + programs, .."""
    head_tiles = (N + TILE - 1) // TILE
    if (program >= head_tiles) & (program > 0):
        return
    offs = tl.arange(0, BLOCK_H * BLOCK_S)
    h, s = offs // BLOCK_S, offs % BLOCK_S
    count = tl.load(totals_ptr + h * SETS + s, mask=(h < H) & (s < SETS), other=0)
    end = tl.cumsum(count, 0)
    tiles = (count + TILE - 1) // TILE
    bits = tl.zeros((BLOCK_H * BLOCK_S,), tl.int64)  # the experts of each set
    rest = s
    for j in tl.static_range(TOP_K):  # the set of that rank, its largest expert first
        e = rest * 0
        for smaller in tl.static_range(1, E):
            e += (_binomial(rest * 0 + smaller, TOP_K - j) <= rest).to(tl.int32)
        rest = _binomial(e + 1, TOP_K - j) - 1 - rest
        bits |= tl.full(bits.shape, 1, tl.int64) << e.to(tl.int64)
    for i in range(program, head_tiles, programs):
        here = i < tiles
        # Tiles that are equally far in their sets stand together: they read the same tokens at about the same time.
        entry = tl.sum(tl.minimum(tiles, i), 0) + tl.cumsum(here.to(tl.int32), 0) - 1
        entry_ptrs = set_tiles_ptr + entry * (3 + TOP_K)
        tl.store(entry_ptrs, end - count + i * TILE, mask=here)
        tl.store(entry_ptrs + 1, end, mask=here)
        tl.store(entry_ptrs + 2, h, mask=here)
        left = bits
        for j in tl.static_range(TOP_K):
            tl.store(entry_ptrs + 3 + j, _lowest(left), mask=here)
            left = left & (left - 1)
        if not JOINT:
            first = h * N + i * TILE
            inside = (end - count < tl.minimum(first + TILE, h * N + N)) & (end > first) & (count > 0)
            used = tl.reduce(tl.reshape(tl.where(inside, bits, 0), (BLOCK_H, BLOCK_S)), 1, _or)
            rank = tl.min(tl.reshape(tl.where(inside, s, SETS), (BLOCK_H, BLOCK_S)), axis=1)
            head = tl.arange(0, BLOCK_H)
            visited_ptrs = visited_ptr + (head * head_tiles + i) * 2
            tl.store(visited_ptrs, used, mask=head < H)
            block = head * (head_tiles * TOP_K + SETS) + i * TOP_K + rank
            tl.store(visited_ptrs + 1, block.to(tl.int64), mask=head < H)
    if program == 0:  # up to the grid's bound
        entry = tl.sum(tiles, 0) + offs
        for column in tl.static_range(3 + TOP_K):
            tl.store(set_tiles_ptr + entry * (3 + TOP_K) + column, offs * 0, mask=entry < set_tiles)


@triton.jit
def _plan_place_kernel(
    experts_ptr, keys_ptr, counts_ptr, totals_ptr,
    order_ptr, offsets_ptr, rank_ptr, set_order_ptr, set_tiles_ptr, token_order_ptr, visited_ptr, N, chunks, set_tiles,
    BY_SETS: tl.constexpr, JOINT: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr,
    SIGNATURES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_HE: tl.constexpr, BLOCK_SIGNATURES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write each item of the chunk to its place, and what a tile of each set (and head) is."""
    route_blocks: tl.constexpr = (H * E + ROWS - 1) // ROWS
    set_blocks: tl.constexpr = H if BY_SETS else 0
    problems: tl.constexpr = route_blocks + set_blocks + (2 if JOINT else 1) if BY_SETS else route_blocks
    chunk = tl.program_id(0) // problems % chunks
    problem = tl.program_id(0) % problems
    side = (tl.program_id(0) // problems // chunks).to(tl.int64)
    offs = tl.arange(0, CHUNK)
    n = chunk * CHUNK + offs
    mask = n < N
    experts_ptr += side * N * (H * TOP_K)
    keys_ptr += side * N * (H + 1)
    counts_ptr += (side * chunks + chunk) * COLUMNS
    totals_ptr += side * COLUMNS
    if problem < route_blocks:
        row = problem * ROWS + tl.arange(0, ROWS)
        mask_row = row < H * E
        mask_tile = mask_row[:, None] & mask[None, :]
        count = tl.zeros((ROWS, CHUNK), tl.int32)
        first_route = (n[None, :] * H + (row // E)[:, None]) * TOP_K
        for j in tl.static_range(TOP_K):
            e = tl.load(experts_ptr + first_route + j, mask=mask_tile, other=-1)
            count += (e == (row % E)[:, None]).to(tl.int32)
        begin = _first_place(totals_ptr, row, H * E, BLOCK_HE)
        base = begin + tl.load(counts_ptr + row, mask=mask_row, other=0)
        place = base[:, None] + tl.cumsum(count, 1) - count
        order_ptr += side * N * (H * TOP_K)
        rank_ptr += side * N * (H * TOP_K)
        for j in tl.static_range(TOP_K):
            e = tl.load(experts_ptr + first_route + j, mask=mask_tile, other=-1)
            here = e == (row % E)[:, None]
            tl.store(order_ptr + place, first_route + j, mask=here)
            if JOINT:
                tl.store(rank_ptr + first_route + j, place, mask=here)
            place += here.to(tl.int32)
        if chunk == 0:
            offsets_ptr += side * (H * E + 1)
            tl.store(offsets_ptr + row, begin, mask=mask_row)
            tl.store(offsets_ptr + H * E, N * (H * TOP_K))
    elif problem < route_blocks + set_blocks:
        h = problem - route_blocks
        key = tl.load(keys_ptr + n * H + h, mask=mask, other=0)
        place = _place(key, mask, counts_ptr + H * E + h * SETS, totals_ptr + H * E + h * SETS, SETS, BLOCK_S)
        tl.store(set_order_ptr + (side * H + h) * N + place, n * H + h, mask=mask)
    elif BY_SETS and problem == route_blocks + set_blocks:
        tiles = (N + TILE - 1) // TILE
        set_tiles_ptr += side * set_tiles * (3 + TOP_K)
        visited_ptr += side * tiles * (2 if JOINT else 2 * H)
        _tables(
            totals_ptr + H * E, set_tiles_ptr, visited_ptr, N, chunk, chunks, set_tiles,
            JOINT, H, E, TOP_K, SETS, BLOCK_H, BLOCK_S, TILE,
        )  # fmt: skip
    elif JOINT:
        key = tl.load(keys_ptr + N * H + n, mask=mask, other=0)
        bits = tl.zeros((CHUNK,), tl.int64)
        for r in tl.static_range(H * TOP_K):
            e = tl.load(experts_ptr + n * (H * TOP_K) + r, mask=mask, other=0)
            bits |= tl.full((CHUNK,), 1, tl.int64) << (r // TOP_K * E + e).to(tl.int64)
        first: tl.constexpr = H * (E + SETS)
        place = _place(key, mask, counts_ptr + first, totals_ptr + first, SIGNATURES, BLOCK_SIGNATURES)
        tl.store(token_order_ptr + side * N + place, n, mask=mask)
        visited_ptr += side * ((N + TILE - 1) // TILE) * 2
        tl.atomic_or(visited_ptr + place // TILE * 2, bits, mask=mask, sem="relaxed")


@triton.jit
def _key_of_route(experts_ptr, routes, mask, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr):
    """Its expert, counted through all heads."""
    return tl.load(experts_ptr + routes, mask=mask, other=0) + routes // TOP_K % H * E


@triton.jit
def _routes_count_kernel(
    experts_ptr, counts_ptr, R, chunks, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_HE: tl.constexpr,
):  # fmt: skip
    """counts[side, chunk]: how many of the chunk's routes each expert has."""
    side = (tl.program_id(0) // chunks).to(tl.int64)
    routes = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    mask = routes < R
    key = _key_of_route(experts_ptr + side * R, routes, mask, H, E, TOP_K)
    offs = tl.arange(0, BLOCK_HE)
    count = tl.histogram(tl.where(mask, key, BLOCK_HE - 1), BLOCK_HE)
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * (H * E) + offs, count, mask=offs < H * E)


@triton.jit
def _routes_place_kernel(
    experts_ptr, counts_ptr, totals_ptr, order_ptr, offsets_ptr, R, chunks,
    H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_HE: tl.constexpr,
):  # fmt: skip
    """Write each of the chunk's routes to its place."""
    side, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    routes = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = routes < R
    key = _key_of_route(experts_ptr + side * R, routes, mask, H, E, TOP_K)
    counts_ptr += tl.program_id(0).to(tl.int64) * (H * E)
    totals_ptr += side * (H * E)
    tl.store(order_ptr + side * R + _place(key, mask, counts_ptr, totals_ptr, H * E, BLOCK_HE), routes, mask=mask)
    if chunk == 0:
        offs = tl.arange(0, BLOCK_HE)
        end = tl.cumsum(tl.load(totals_ptr + offs, mask=offs < H * E, other=0), 0)
        offsets_ptr += side * (H * E + 1)
        tl.store(offsets_ptr + 1 + offs, end, mask=offs < H * E)
        tl.store(offsets_ptr, 0)


# ---- launchers


def plan_shapes(N: int, H: int, E: int, TOP_K: int, by_sets: bool) -> tuple[tuple[int, ...], ...]:
    """Of the fields of a Plan."""
    entries, passes, tokens = sets.tables(N, H, E, TOP_K) if by_sets else (0, 0, 0)
    rows = N * H if by_sets else 0
    return (
        (N * H * TOP_K,),
        (H * E + 1,),
        (tokens * H * TOP_K,),
        (rows,),
        (entries, 3 + TOP_K),
        (tokens,),
        (passes * cdiv(N, sets.TILE), 2),
    )


def _routing_plan_fake(experts, n_experts, by_sets):
    sides, N, H, TOP_K = experts.shape
    *ints, visited = plan_shapes(N, H, n_experts, TOP_K, by_sets)
    return *(experts.new_empty(sides, *shape) for shape in ints), experts.new_empty(sides, *visited, dtype=torch.int64)


@opaque(_routing_plan_fake)
def routing_plan(
    experts: torch.Tensor, n_experts: int, by_sets: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """experts [sides, N, H, TOP_K] -> the fields of a Plan, each with the sides as another first axis. Nothing visits the host.

    `by_sets`: whether to sort by sets too, of which there must be few (sets.py).
    """
    experts = experts.contiguous()
    sides, N, H, TOP_K = experts.shape
    plan = _routing_plan_fake(experts, n_experts, by_sets)
    HE = H * n_experts
    if HE > MAX_COUNTED:
        few = HE <= MAX_COMPARED and N * H * TOP_K <= MAX_ROUTES
        return *(_compared_routes if few else _sorted_routes)(experts, n_experts), *plan[2:]
    S, heads, joint = (math.comb(n_experts, TOP_K), H, sets.joint(n_experts, TOP_K)) if by_sets else (1, 1, False)
    while heads > 1 and S**heads >= 2**31:  # as many heads as fit an int32: any order is right
        heads -= 1
    divisor = cdiv(S**heads, MAX_SIGNATURES)
    signatures = cdiv(S**heads, divisor) if joint else 0
    columns = HE + (H * S + signatures if by_sets else 0)
    chunks = max(cdiv(N, CHUNK), 1)
    counts, totals = experts.new_empty(sides, chunks, columns), experts.new_empty(sides, columns)
    keys = experts.new_empty(sides, N * (H + 1)) if by_sets else counts
    meta = {
        "BY_SETS": by_sets, "JOINT": joint, "H": H, "E": n_experts, "TOP_K": TOP_K, "SETS": S, "COLUMNS": columns,
        "CHUNK": CHUNK, "ROWS": ROWS, "BLOCK_H": next_power_of_2(H, 1), "num_warps": 2,
    }  # fmt: skip
    blocks = cdiv(HE, ROWS)
    launch(
        _plan_count_kernel, (sides * chunks * (blocks + by_sets),),
        experts, keys, counts, N, chunks, SORTED_HEADS=heads, DIVISOR=divisor, **meta,
    )  # fmt: skip
    _sum_counts(counts, totals, plan[6], N, joint, HE)
    launch(
        _plan_place_kernel, (sides * chunks * (blocks + (H + 1 + joint if by_sets else 0)),),
        experts, keys, counts, totals, *plan, N, chunks, plan[4].shape[1],
        SIGNATURES=signatures, TILE=sets.TILE, BLOCK_HE=next_power_of_2(HE), BLOCK_S=next_power_of_2(S, 1),
        BLOCK_SIGNATURES=next_power_of_2(signatures), **meta,
    )  # fmt: skip
    return plan


def _sum_counts(counts, totals, visited, N, joint, HE):
    sides, chunks, columns = counts.shape
    launch(
        _plan_sum_kernel, (sides * cdiv(columns, 8),),
        counts, totals, visited, N, chunks, JOINT=joint, HE=HE, COLUMNS=columns, TILE=sets.TILE, BLOCK_C=512, BLOCK_K=8,
    )  # fmt: skip


def _compared_routes(experts, n_experts):
    """order and offsets, without a row for each expert."""
    sides, N, H, TOP_K = experts.shape
    R, HE = N * H * TOP_K, H * n_experts
    chunks = max(cdiv(R, ROUTES), 1)
    order, offsets = experts.new_empty(sides, R), experts.new_empty(sides, HE + 1)
    counts, totals = experts.new_empty(sides, chunks, HE), experts.new_empty(sides, HE)
    meta = {"H": H, "E": n_experts, "TOP_K": TOP_K, "CHUNK": ROUTES, "BLOCK_HE": next_power_of_2(HE + 1), "num_warps": 4}
    launch(_routes_count_kernel, (sides * chunks,), experts, counts, R, chunks, **meta)
    _sum_counts(counts, totals, totals, N, False, HE)
    launch(_routes_place_kernel, (sides * chunks,), experts, counts, totals, order, offsets, R, chunks, **meta)
    return order, offsets


def _sorted_routes(experts, n_experts):
    """order and offsets by torch.sort, which is faster where experts or routes are many."""
    sides, N, H, TOP_K = experts.shape
    R, HE = N * H * TOP_K, H * n_experts
    heads = torch.arange(sides * H, device=experts.device, dtype=torch.int32).view(sides, 1, H, 1) * n_experts
    dtype = torch.uint8 if sides * HE <= 255 else torch.int16 if sides * HE <= 32767 else torch.int32  # fewer bytes, fewer passes
    expert, order = torch.sort((experts + heads).reshape(-1).to(dtype), stable=True)
    groups = torch.arange(sides * HE + 1, device=experts.device, dtype=dtype)
    order, offsets = order.to(torch.int32).view(sides, R), torch.searchsorted(expert, groups, out_int32=True)
    if sides == 1:
        return order, offsets[None]
    first = torch.arange(sides, device=experts.device, dtype=torch.int32)[:, None] * R
    return order - first, offsets.unfold(0, HE + 1, HE) - first
