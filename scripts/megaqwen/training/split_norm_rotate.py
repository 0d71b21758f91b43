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

ROWS = 8  # tokens that a program of backward sums the weights' gradients over
WARPS = 8


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
    NORM: tl.constexpr,
):
    """One token: every head of `mixed` [token, group, RATIO queries + key + value, 2 HALF]."""
    row = tl.program_id(0).to(tl.int64)
    head, lane = tl.arange(0, HEADS), tl.arange(0, HALF)
    group, part = head // (RATIO + 2), head % (RATIO + 2)
    real = (head < GROUPS * (RATIO + 2))[:, None]
    is_query, is_key, is_value = part < RATIO, part == RATIO, part == RATIO + 1
    source = (
        mixed + row * GROUPS * (RATIO + 2) * 2 * HALF + head[:, None] * 2 * HALF + lane[None, :]
    )
    first = tl.load(source, mask=real, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=real, other=0.0).to(tl.float32)
    angle = tl.load(angles + (row // batch) * 2 * HALF + lane)
    cosine = tl.where(is_value[:, None], 1.0, tl.cos(angle)[None, :])
    sine = tl.where(is_value[:, None], 0.0, tl.sin(angle)[None, :])
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        scale = tl.where(is_value, 1.0, tl.rsqrt(squares + epsilon))[:, None]
        w1 = tl.where(
            is_query[:, None], tl.load(q_weight + lane)[None, :], tl.load(k_weight + lane)[None, :]
        )
        w2 = tl.where(
            is_query[:, None],
            tl.load(q_weight + HALF + lane)[None, :],
            tl.load(k_weight + HALF + lane)[None, :],
        )
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
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS tokens; `d_weights` [program, 2, 2 HALF] gets their sums for the query's and key's norm."""
    head, lane = tl.arange(0, HEADS), tl.arange(0, HALF)
    group, part = head // (RATIO + 2), head % (RATIO + 2)
    real = (head < GROUPS * (RATIO + 2))[:, None]
    is_query, is_key, is_value = part < RATIO, part == RATIO, part == RATIO + 1
    if NORM:
        w1 = tl.where(
            is_query[:, None], tl.load(q_weight + lane)[None, :], tl.load(k_weight + lane)[None, :]
        )
        w2 = tl.where(
            is_query[:, None],
            tl.load(q_weight + HALF + lane)[None, :],
            tl.load(k_weight + HALF + lane)[None, :],
        )
        w1, w2 = w1.to(tl.float32), w2.to(tl.float32)
        q_sum1 = tl.zeros([HALF], tl.float32)
        q_sum2 = tl.zeros([HALF], tl.float32)
        k_sum1 = tl.zeros([HALF], tl.float32)
        k_sum2 = tl.zeros([HALF], tl.float32)
    for number in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + number
        there = real & (row < tokens)
        at = row * GROUPS * RATIO + group * RATIO + part
        of_query = d_query + at[:, None] * 2 * HALF + lane[None, :]
        shared = (row * GROUPS + group)[:, None] * 2 * HALF + lane[None, :]
        on_query, on_key = there & is_query[:, None], there & is_key[:, None]
        on_value = there & is_value[:, None]
        g1 = tl.load(of_query, mask=on_query, other=0.0).to(tl.float32)
        g2 = tl.load(of_query + HALF, mask=on_query, other=0.0).to(tl.float32)
        g1 += tl.load(d_key + shared, mask=on_key, other=0.0).to(tl.float32)
        g2 += tl.load(d_key + shared + HALF, mask=on_key, other=0.0).to(tl.float32)
        g1 += tl.load(d_value + shared, mask=on_value, other=0.0).to(tl.float32)
        g2 += tl.load(d_value + shared + HALF, mask=on_value, other=0.0).to(tl.float32)
        angle = tl.load(
            angles + (row // batch) * 2 * HALF + lane,
            mask=lane < tl.where(row < tokens, HALF, 0),
            other=0.0,
        )
        cosine = tl.where(is_value[:, None], 1.0, tl.cos(angle)[None, :])
        sine = tl.where(is_value[:, None], 0.0, tl.sin(angle)[None, :])
        d1 = g1 * cosine + g2 * sine
        d2 = g2 * cosine - g1 * sine
        place = row * GROUPS * (RATIO + 2) * 2 * HALF + head[:, None] * 2 * HALF + lane[None, :]
        if NORM:
            first = tl.load(mixed + place, mask=there, other=0.0).to(tl.float32)
            second = tl.load(mixed + place + HALF, mask=there, other=0.0).to(tl.float32)
            squares = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
            scale = tl.rsqrt(squares + epsilon)[:, None]
            first *= scale
            second *= scale
            q_sum1 += tl.sum(tl.where(is_query[:, None], d1 * first, 0.0), axis=0)
            q_sum2 += tl.sum(tl.where(is_query[:, None], d2 * second, 0.0), axis=0)
            k_sum1 += tl.sum(tl.where(is_key[:, None], d1 * first, 0.0), axis=0)
            k_sum2 += tl.sum(tl.where(is_key[:, None], d2 * second, 0.0), axis=0)
            n1, n2 = d1 * w1, d2 * w2
            mean = (tl.sum(n1 * first + n2 * second, axis=1) / (2 * HALF))[:, None]
            d1 = tl.where(is_value[:, None], d1, scale * (n1 - first * mean))
            d2 = tl.where(is_value[:, None], d2, scale * (n2 - second * mean))
        tl.store(d_mixed + place, d1, mask=there)
        tl.store(d_mixed + place + HALF, d2, mask=there)
    if NORM:
        sums = d_weights + tl.program_id(0) * 4 * HALF + lane
        tl.store(sums, q_sum1)
        tl.store(sums + HALF, q_sum2)
        tl.store(sums + 2 * HALF, k_sum1)
        tl.store(sums + 3 * HALF, k_sum2)


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
            "NORM": q_weight is not None,
            "num_warps": WARPS,
        }
        weights = (q_weight, k_weight) if q_weight is not None else (mixed, mixed)
        forward_kernel[(sequence * batch,)](
            mixed, angles, *weights, query, key, value, batch, epsilon, **shape
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
        programs, norm = triton.cdiv(sequence * batch, ROWS), ctx.shape["NORM"]
        size = (programs, 2, 2 * ctx.shape["HALF"]) if norm else (1,)
        d_weights = torch.empty(size, dtype=torch.float32, device=d_mixed.device)
        inputs = (
            (mixed, angles, q_weight, k_weight) if norm else (d_mixed, angles, d_mixed, d_mixed)
        )
        backward_kernel[(programs,)](
            *inputs,
            *(d_query, d_key, d_value, d_mixed, d_weights),
            *(sequence * batch, batch, ctx.epsilon),
            **ctx.shape,
            ROWS=ROWS,
        )
        if not norm:
            return d_mixed, None, None, None, None, None, None
        d_q, d_k = d_weights.sum(dim=0).to(q_weight.dtype)
        return d_mixed, None, d_q, d_k, None, None, None
