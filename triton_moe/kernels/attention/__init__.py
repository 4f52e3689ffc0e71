"""Fused attention: softmax over the keys without a [T, S] tensor.

    s_ij = scale * (q_i . k_j + q_pos_i . k_pos_j)   where query i sees key j, else -inf
    o_i  = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij)

    delta_i = do_i . o_i                   ds_ij = p_ij (do_i . v_j - delta_i + dlse_i)
    dv_j = sum_i p_ij do_i                 dk_j = scale * sum_i ds_ij q_i
    dq_i = scale * sum_j ds_ij k_j         dq_pos_i = scale * sum_j ds_ij k_pos_j

Query head h reads key head h // GROUP, GROUP = H // Hkv. q_pos and k_pos carry the Transformer-XL term (../xl.py): F channels,
k_pos [S, F] a constant table. A query that sees no key has o = 0, lse = -inf and zero gradients.

configs.py has the tiles and what the launchers share; masks.py, which keys a query sees; tiles.py, what the kernels share;
forward.py and backward.py, the kernels, each with its launcher.

NOTE [Order]
    The heads go in sections, one after the other, of as many as SECTION_BYTES hold the rows of, so that the second-level cache
    keeps what their programs share; in a section the longest tiles of a causal mask start first. At T 1024 (NOTE [Hopper])
    that takes the forward pass from 112 to 105 us, dq from 151 to 133 and dk with dv from 212 to 197. Sections differ by one head
    at most: a small one at the end would leave most of the device idle during its longest tiles.

NOTE [Position channels]
    The Transformer-XL term is a second product of queries and keys, so a tile of queries holds the F channels of q_pos beside
    those of q, a tile of keys those of k_pos, and dq_pos is made with dq: nothing has T^2 elements. That is for at most
    WIDEST_POSITIONS channels of 16 bits. More, or float32, would not fit: then scores take POSITION_CHUNK channels at a time, and
    so does dq_pos, in programs that make the scores once more. On an H200 the forward pass of H 8, P 64, F 192 (N = 32768, T
    1024) takes 273 us with these tiles in shared memory, and 287 with those of the queries in registers.

    Those held whole are held POSITION_PART at a time. With 256 in one, which have another layout than the 128 of a head, dq of
    128 x 32 spilled 16 bytes. Without, it takes 301 us and not 300 (H 4, P 112, F 256, N = 32768, T 1024), the forward pass 222,
    dk with dv 342 and not 345; tiles of 128 x 16 take 386, of 64 x 32 644. And dq of F 512 (T 8192) takes 11.6 ms in tiles of 32
    x 32, three stages, which spill nothing, and 12.9 in those of 64 x 16, which spilled 272 bytes.

NOTE [Float32]
    What rounds float32 most is not the products but the differences. So without tf32 (EXACT) scores and lse stay in natural
    units and exp is our own; 16-bit inputs and tf32 fold log2(e) into the scale, as exp2 is what the hardware has. And the
    backward pass of EXACT first loops over the keys once more, for two numbers of each query: norm = 1 / sum_j p_ij, which takes
    the rounding of lse out of p again, and delta as the average of the very do.v that it is subtracted from, against which it
    cancels where a query sees few keys. The others need no norm, and take delta - dlse from do.o in the kernel of dq.

NOTE [Head widths]
    A tile spans a head in one or two powers of two, 80 = 64 + 16, and 16-bit rows start on 16 bytes, if need be in a padded copy:
    on an H200 (bfloat16, causal, N = 32768, T 4096, H 4) 80 channels take 229 us forward in two parts and 311 us as 128.
    A third part does not pay, presumably as products of 16 and 32 columns cost the matrix units nearly what wider ones cost: 112
    = 64 + 32 + 16 channels, the best of four tiles forward and of seven backward, in us at T 1024, 4096 and 16384, against 128:

        forward pass  129, 386, 1332 against 108, 291, 1043       backward pass  348, 1000, 3418 against 283, 799, 3020

NOTE [RoPE]
    By default queries and keys are rotated before these kernels: position.py makes rotated copies of a caller's, and rotates dq
    and dk back in place. A layer's own it rotates in place, with the channels of a pair side by side: the layer packs its weights
    so, and puts their gradients in order again, in launches that copy them anyway. Heads that are to be padded it copies: 8 of
    100 channels into 128 take 31 us, where all are rotated in place 33, half of them 16, and the product before it then 20 less.
    Scores do not mind, and the threads that hold dq and dk then have both channels of a pair: they rotate them back just before
    the store, by a table of cos and sin that takes 2 us to make. Measured on an H200 (bfloat16, causal, N = 32768, H 4), a launch
    of its own for q and k, and the whole backward pass of attention, in halves -> in pairs, in us:

        P 128, 100 rotated, T 1024    44 -> 35    359 -> 331        P 128,  50 rotated, T 1024    21 -> 13    335 -> 332
        P 128, 100 rotated, T 4096    45 -> 35    994 -> 955        P  80,  76 rotated, T 1024    42 -> 28    286 -> 260
        P 128, 128 rotated, T 1024    37 -> 37    353 -> 335        P  64,  64 rotated, T 1024    14 -> 12    194 -> 190

    The product that makes q and k cannot hide the rotation: 1024 x 1024 weights, the two together in cuBLAS and a launch take 130
    us at T 1024 and 135 at T 4096 (100 rotated). A product of our own (TMA, tiles of 128 x 256 x 64, 8 warps), which takes 106 to
    116 us without the rotation to cuBLAS's 96 to 101, takes 125 and 130 with it and the table, and with 50 rotated 135, not 122.

    With `recompute` there are no copies: a tile's parts are the halves of the rotated channels and the rest of a head, and the
    halves are rotated as they are loaded, by a table of cos and sin in float32; dq and dk, back before the store. With the same
    tiles a forward pass gives the bits that it gives with copies (P 128, 64 or 128 rotated). But a key (for dk, a query) is
    rotated once for every tile that meets it, between its load and the product; the queries cannot carry the rotation alone, as
    R_{j-i} depends on both. Measured likewise, copies -> on load (with the best of eight tiles), in us at T 256, 1024 and 4096:

                                         forward pass                      forward and backward pass
        P 128, 128 rotated    102 ->  86  147 -> 201  328 -> 662    307 -> 412  471 -> 799  1170 -> 2348
        P 128,  64 rotated    103 -> 101  148 -> 174  329 -> 458    291 -> 350  454 -> 624  1154 -> 1721
        P  64,  64 rotated     56 ->  45   82 ->  98  190 -> 307    183 -> 197  279 -> 414   692 -> 1293

    96 -> 32 MiB are kept for the backward pass, and at its peak 194 -> 130 allocated (P 64: half of all). The tiles in CONFIGS
    spill nothing up to 128 channels: with them dk and dv take 321, 304 and 175 us at T 1024, where those above took 348, 244 (40
    bytes spilled) and 193. Loads that do not wait in shared memory (one stage) make the fastest forward pass: 196 and 95 us,
    where the best of others took 206 and 124 (P 128 and 64, all rotated). A table in float16 would save 9 to 20 %.

    A forward pass alone is faster on load where a key meets few tiles: B 32, S = T 64, 128 and 256 take 14 -> 11, 17 -> 12 and
    32 -> 22 us (P 128, 64 rotated), B 8 with T 256 16 -> 14. And for few queries of many keys, where there are heads enough to
    hide a tile's rotation: S 8192, B 32, T 1 268 -> 155 us (128 rotated: 267 -> 186; P 64: 169 -> 132), T 64 270 -> 179; B 16,
    T 1 186 -> 153 (185 -> 184; 130 -> 131), B 8 149 -> 152. So it is done there where no gradient is wanted. Grouped heads rotate
    a key once for each: 16 on 4, T 1, 490 -> 440 with B 32, S 8192, and 421 -> 464 with B 128, S 2048. They have copies.

NOTE [Registers]
    What LLVM moves out of the loops of dk and dv takes registers in all of them: they spilled, 64 x 64 of P 128 16 bytes, and
    with grouped heads, whose loops stand in another one, 88. Without that (disable_licm) neither does, with Triton 3.6, and on an
    H200 (bfloat16, causal, N = 32768, P 128, T 1024) they take 159 us instead of 164 for H 4, and for 8 heads on 2 keys' 189
    where 32 x 128, the tile before, took 355. The forward pass of T 4096 would take 327 instead of 301.

    Elsewhere (HOIST) it is the other way round: without, tiles of 32 x 32 in 16 bits spill 8 to 40 bytes on sm_80 and sm_100,
    and with it nothing. float32 does not like it (240 bytes instead of 124 on gfx942), nor does rotation on load (32, not none).

    Heads of 256 channels stay whole. As 128 + 128 they let dk with dv take tiles of 64 x 32, 1839 us at T 4096 and 545 at 1024
    where 32 x 32 takes 2405 and 673, but with Triton 3.7 these spill 48 bytes, and the tiles of sm_100 8 to 24; whole, they spill
    56, and take 1858 and 565. dq in tiles of 128 x 32 takes 805 and 292, 1068 and 338 in those of 64 x 16 before (H 4, causal).

NOTE [One stage]
    Rotated on load, with values in two parts (76 = 64 + 16 channels) and one stage, the forward pass wrote wrong numbers into the
    second part, not the same ones each time, or read where nothing is (H200, Triton 3.6; its PTX shows no fault). With more
    stages it is right, as it is without rotation, so all such tiles, of the backward pass too, are launched with at least two.
    Values in one part are right with one.

NOTE [Hopper]
    Measured on an H200, bfloat16, causal, N = 32768, H 4, P 128, in us at T 1024 and 4096: forward 105 and 281, dq 133 and
    360, dk with dv 177 and 499. At T 4096 the tensor cores work 51 to 58 % of the cycles. Triton waits for a product before it
    goes on, so in a block products and exponentials take turns, and only the other block of a multiprocessor fills in; a third
    finds no registers. The rest is spent at the barriers of the loop and waiting for copies: with two stages, all that fit
    beside two blocks, a tile's copy starts when the tile before it ends. What was tried, forward / dq / dk with dv at T 4096,
    against 284 / 385 / 578 before sections:
    * one loop for all tiles, with the mask in a branch: 324 / 423 / 647, as then all loads are masked;
    * tiles of 32 for three blocks a multiprocessor, or four stages: 330 / 405 / 606;
    * 8 warps on 128 rows: 328 / 354 / 672, and slower at T 1024;
    * the next tile's scores, or its do.v, in flight during this one's exponentials: 358 / 516, and with Triton 3.6 mostly wrong;
    * the statistics in the layout of the tile, each thread fetching them number by number: 569 instead of 509 for dk with dv;
    * tensor descriptors: 176 for dk with dv at T 1024, no faster than pointers now; one shape died with an illegal instruction.
    And one kernel for the whole backward pass, five products instead of seven: the programs of dk and dv also add ds k to dq, in
    float32 and in an order that a counter for each tile of queries keeps. It repeats bitwise, but at T 4096 takes 1401 us instead
    of 812: tiles of 64 x 64, 4 warps, dq by 32 channels, added by TMA; 590 without dq, 1106 with dq only stored, 1245 with dq
    added in any order. 32 queries x 128 keys, 8 warps, spill nothing: 806, 1276, 1424, and 1753 in order. Nor is it better at
    T 1024 (462 instead of 293), at T 16384 (5140 instead of 2961) or for P 64 (727 instead of 484 at T 4096).

NOTE [Gated rows]
    A layer's projections read rows of attention gated: the output projection o packed (../sets.py), its weight's gradient o once
    for each route, the value projection's gradient dv packed, with the dots of u and dv. Launches of their own make these; the
    kernels here could store them at once. Measured on an H200 (bfloat16, causal, N = 32768, H 4, E 4, TOP_K 2; graphs replayed
    by turns): the us that a kernel then takes longer, and those of the launch that it spares:

                                      P 128, T 256      T 1024      T 4096      P 64, T 1024
        o packed, forward                27 for 40    25 for 40   23 for 39        13 for 23
        o for each route, dq             15 for 29    15 for 29   17 for 29         9 for 15
        dv packed and dots, dk, dv       63 for 67    66 for 67   85 for 67        38 for 45

    Of the forward pass's 25 us 16 remain with all stores masked off: presumably its gates, places and a tile for each expert
    change their layout at barriers, and only the other block of a multiprocessor fills in. That is with gates and places loaded
    before the loop, after it 29; for dk and dv before it spills, 98. From the tile stored and loaded again it was no faster. With
    the first two a layer took 12 us less of 1974 at T 1024 (P 100, D 1024, forward and backward), 15 of 2799 at T 4096, 10 of
    1292 for P 64, and 9 of 524 for H 2, E 5, TOP_K 3, P 76, D 412, N = 16384, T 256, for 330 more lines.
"""

from .backward import _attention_bwd_dkdv_kernel, _attention_bwd_dq_kernel, attention_backward, heads_side_by_side
from .configs import CONFIGS, SPACE, tile_width
from .forward import _attention_fwd_kernel, attention_forward

__all__ = [
    "CONFIGS",
    "SPACE",
    "_attention_bwd_dkdv_kernel",
    "_attention_bwd_dq_kernel",
    "_attention_fwd_kernel",
    "attention_backward",
    "attention_forward",
    "heads_side_by_side",
    "tile_width",
]
