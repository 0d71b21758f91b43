"""From one matrix product to attention's query, key and value in one kernel, and back in another.

Between them Megatron and Transformer Engine run up to nine: each part is copied out, normalized (Qwen3)
and rotated, and in backward the parts are joined again. They move the same few bytes over and over: of an
8B in FP8 that is one part in twenty-five of the time. Here each is read and written once, in float32 in
between, so it also rounds less. Weights, their names and checkpoints are Megatron's.
"""

from typing import Any

import torch
import triton
import triton.language as tl

WARPS = 8  # of a program of forward
# Of a program of backward, with norms, whose gradients it sums up, and without.
ROWS = {True: 16, False: 4}  # tokens
BACKWARD_WARPS = {True: 2, False: 4}


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    mixed,
    angles,
    q_weight,
    k_weight,
    query,
    key,
    value,
    batch,
    epsilon,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    NORM: tl.constexpr,
):
    """One token: every head of `mixed` [token, group, RATIO queries + key + value, 2 HALF]."""
    row = tl.program_id(0).to(tl.int64)
    head, lane = tl.arange(0, HEADS), tl.arange(0, LANES)
    whole = lane < HALF
    group, part = head // (RATIO + 2), head % (RATIO + 2)
    real = (head < GROUPS * (RATIO + 2))[:, None] & whole[None, :]
    is_query, is_key, is_value = part < RATIO, part == RATIO, part == RATIO + 1
    source = (
        mixed + row * GROUPS * (RATIO + 2) * 2 * HALF + head[:, None] * 2 * HALF + lane[None, :]
    )
    first = tl.load(source, mask=real, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=real, other=0.0).to(tl.float32)
    angle = tl.load(angles + (row // batch) * 2 * HALF + lane, mask=whole, other=0.0)
    cosine = tl.where(is_value[:, None], 1.0, tl.cos(angle)[None, :])
    sine = tl.where(is_value[:, None], 0.0, tl.sin(angle)[None, :])
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        scale = tl.where(is_value, 1.0, tl.rsqrt(squares + epsilon))[:, None]
        q1 = tl.load(q_weight + lane, mask=whole, other=0.0)
        q2 = tl.load(q_weight + HALF + lane, mask=whole, other=0.0)
        k1 = tl.load(k_weight + lane, mask=whole, other=0.0)
        k2 = tl.load(k_weight + HALF + lane, mask=whole, other=0.0)
        w1 = tl.where(is_query[:, None], q1[None, :], k1[None, :])
        w2 = tl.where(is_query[:, None], q2[None, :], k2[None, :])
        first *= scale * tl.where(is_value[:, None], 1.0, w1.to(tl.float32))
        second *= scale * tl.where(is_value[:, None], 1.0, w2.to(tl.float32))
    out1 = first * cosine - second * sine
    out2 = second * cosine + first * sine
    at = row * GROUPS * RATIO + group * RATIO + part
    to_query = query + at[:, None] * 2 * HALF + lane[None, :]
    tl.store(to_query, out1, mask=real & is_query[:, None])
    tl.store(to_query + HALF, out2, mask=real & is_query[:, None])
    shared = (row * GROUPS + group)[:, None] * 2 * HALF + lane[None, :]
    tl.store(key + shared, out1, mask=real & is_key[:, None])
    tl.store(key + shared + HALF, out2, mask=real & is_key[:, None])
    tl.store(value + shared, out1, mask=real & is_value[:, None])
    tl.store(value + shared + HALF, out2, mask=real & is_value[:, None])


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    mixed,
    angles,
    q_weight,
    k_weight,
    d_query,
    d_key,
    d_value,
    d_mixed,
    d_weights,
    tokens,
    batch,
    epsilon,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One group of ROWS tokens: few heads, so that many programs share a multiprocessor.

    `d_weights` [tokens / ROWS, group, 2, 2 HALF] gets their sums for the query's and the key's norm.
    """
    block, group = tl.program_id(0), tl.program_id(1)
    part, lane = tl.arange(0, HEADS), tl.arange(0, LANES)
    whole = lane < HALF
    is_query, is_key = (part < RATIO)[:, None], (part == RATIO)[:, None]
    is_value = (part == RATIO + 1)[:, None]
    real = (part < RATIO + 2)[:, None] & whole[None, :]
    if NORM:
        q1 = tl.load(q_weight + lane, mask=whole, other=0.0)
        q2 = tl.load(q_weight + HALF + lane, mask=whole, other=0.0)
        k1 = tl.load(k_weight + lane, mask=whole, other=0.0)
        k2 = tl.load(k_weight + HALF + lane, mask=whole, other=0.0)
        w1 = tl.where(is_query, q1[None, :], k1[None, :]).to(tl.float32)
        w2 = tl.where(is_query, q2[None, :], k2[None, :]).to(tl.float32)
        sum1 = tl.zeros([HEADS, LANES], tl.float32)
        sum2 = tl.zeros([HEADS, LANES], tl.float32)
    for number in range(ROWS):
        row = block.to(tl.int64) * ROWS + number
        there = real & (row < tokens)
        of_query = d_query + (row * GROUPS + group) * RATIO * 2 * HALF
        of_query += part[:, None] * 2 * HALF + lane[None, :]
        shared = (row * GROUPS + group) * 2 * HALF + tl.broadcast_to(lane[None, :], (HEADS, LANES))
        g1 = tl.load(of_query, mask=there & is_query, other=0.0).to(tl.float32)
        g2 = tl.load(of_query + HALF, mask=there & is_query, other=0.0).to(tl.float32)
        g1 += tl.load(d_key + shared, mask=there & is_key, other=0.0).to(tl.float32)
        g2 += tl.load(d_key + shared + HALF, mask=there & is_key, other=0.0).to(tl.float32)
        g1 += tl.load(d_value + shared, mask=there & is_value, other=0.0).to(tl.float32)
        g2 += tl.load(d_value + shared + HALF, mask=there & is_value, other=0.0).to(tl.float32)
        position = tl.where(row < tokens, row // batch, 0)
        angle = tl.load(angles + position * 2 * HALF + lane, mask=whole, other=0.0)
        cosine = tl.where(is_value, 1.0, tl.cos(angle)[None, :])
        sine = tl.where(is_value, 0.0, tl.sin(angle)[None, :])
        d1 = g1 * cosine + g2 * sine
        d2 = g2 * cosine - g1 * sine
        place = (row * GROUPS + group) * (RATIO + 2) * 2 * HALF
        place += part[:, None] * 2 * HALF + lane[None, :]
        if NORM:
            first = tl.load(mixed + place, mask=there, other=0.0).to(tl.float32)
            second = tl.load(mixed + place + HALF, mask=there, other=0.0).to(tl.float32)
            squares = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
            scale = tl.rsqrt(squares + epsilon)[:, None]
            first *= scale
            second *= scale
            sum1 += d1 * first
            sum2 += d2 * second
            n1, n2 = d1 * w1, d2 * w2
            mean = (tl.sum(n1 * first + n2 * second, axis=1) / (2 * HALF))[:, None]
            d1 = tl.where(is_value, d1, scale * (n1 - first * mean))
            d2 = tl.where(is_value, d2, scale * (n2 - second * mean))
        tl.store(d_mixed + place, d1, mask=there)
        tl.store(d_mixed + place + HALF, d2, mask=there)
    if NORM:
        sums = d_weights + (block * GROUPS + group) * 4 * HALF + lane
        tl.store(sums, tl.sum(tl.where(is_query, sum1, 0.0), axis=0), mask=whole)
        tl.store(sums + HALF, tl.sum(tl.where(is_query, sum2, 0.0), axis=0), mask=whole)
        tl.store(sums + 2 * HALF, tl.sum(tl.where(is_key, sum1, 0.0), axis=0), mask=whole)
        tl.store(sums + 3 * HALF, tl.sum(tl.where(is_key, sum2, 0.0), axis=0), mask=whole)


class SplitNormRotate(torch.autograd.Function):
    """Query, key and value, each [sequence, batch, heads, head size], of the joint product."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        angles: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        groups: int,
        head_size: int,
        epsilon: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split, normalize where there are weights, rotate.

        Args:
            mixed: [sequence, batch, groups x (queries of a group + 2) x head size].
            angles: [sequence or more, 1, 1, head size], float32; the halves are equal.
            q_weight: Of the query's RMSNorm, [head size]; None: there is no norm.
            k_weight: Of the key's.
            groups: Query groups on this rank.
            head_size: Elements of a head.
            epsilon: The norms'.
        """
        mixed = mixed.contiguous()
        sequence, batch = mixed.shape[:2]
        ratio = mixed.shape[2] // groups // head_size - 2
        query = mixed.new_empty(sequence, batch, groups * ratio, head_size)
        key = mixed.new_empty(sequence, batch, groups, head_size)
        value = torch.empty_like(key)
        shape = {
            "GROUPS": groups,
            "RATIO": ratio,
            "HALF": head_size // 2,
            "HEADS": triton.next_power_of_2(groups * (ratio + 2)),
            "LANES": triton.next_power_of_2(head_size // 2),
            "NORM": q_weight is not None,
        }
        weights = (q_weight, k_weight) if q_weight is not None else (mixed, mixed)
        forward_kernel[(sequence * batch,)](
            mixed, angles, *weights, query, key, value, batch, epsilon, **shape, num_warps=WARPS
        )
        ctx.save_for_backward(mixed if shape["NORM"] else None, angles, q_weight, k_weight)
        ctx.shape, ctx.epsilon, ctx.mixed_shape = shape, epsilon, mixed.shape
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """The joint product's gradient and those of the norms' weights."""
        mixed, angles, q_weight, k_weight = ctx.saved_tensors
        d_query, d_key, d_value = (gradient.contiguous() for gradient in gradients)
        d_mixed = d_query.new_empty(ctx.mixed_shape)
        sequence, batch = ctx.mixed_shape[:2]
        norm = ctx.shape["NORM"]
        blocks = triton.cdiv(sequence * batch, ROWS[norm])
        groups, ratio = ctx.shape["GROUPS"], ctx.shape["RATIO"]
        size = (blocks * groups, 2, 2 * ctx.shape["HALF"]) if norm else (1,)
        d_weights = torch.empty(size, dtype=torch.float32, device=d_mixed.device)
        inputs = (
            (mixed, angles, q_weight, k_weight) if norm else (d_mixed, angles, d_mixed, d_mixed)
        )
        backward_kernel[(blocks, groups)](
            *inputs,
            *(d_query, d_key, d_value, d_mixed, d_weights),
            *(sequence * batch, batch, ctx.epsilon),
            **{**ctx.shape, "HEADS": triton.next_power_of_2(ratio + 2)},
            ROWS=ROWS[norm],
            num_warps=BACKWARD_WARPS[norm],
        )
        if not norm:
            return d_mixed, None, None, None, None, None, None
        d_q, d_k = d_weights.sum(dim=0).to(q_weight.dtype)
        return d_mixed, None, d_q, d_k, None, None, None
