"""Claims about v4jax/quant: codes and scales are those of the official kernels, bit for bit.

The judge is arithmetic on one number at a time.
"""

import math

import numpy as np
import pytest

from v4jax.quant import fp8, mxfp4, scales

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = (
    [0.0]
    + [i / 8 * 2.0**-6 for i in range(1, 8)]
    + [(1 + i / 8) * 2.0 ** (e - 7) for e in range(1, 16) for i in range(8)][:-1]
)


def nearest_even(x: float, values) -> int:
    """Code of the value nearest to |x|; of two equally near, the one with an even code."""
    return min(range(len(values)), key=lambda code: (abs(abs(x) - values[code]), code % 2))


def power(amax: float, largest: float) -> float:
    """2^ceil(log2(amax / largest)), with the float32 product that official kernels take."""
    fraction, exponent = math.frexp(float(np.float32(amax) * np.float32(1 / largest)))
    return 2.0 ** (exponent - 1 if fraction == 0.5 else exponent)


def random(shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32) * np.exp2(
        rng.integers(-30, 30, (shape[0], 1))
    ).astype(np.float32)
    x[0] = 0  # a row of zeros, and one of numbers halfway between codes
    x[1] = np.resize(
        np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -2.5, -5.0, 6.0], np.float32),
        shape[1],
    )
    return x


def test_mxfp4_is_the_plain_restatement():
    x = random((6, 96))
    packed, scale = mxfp4.quantise(x)
    assert packed.dtype == np.int8 and packed.shape == (6, 48) and scale.shape == (6, 3)
    for row in range(6):
        for column in range(96):
            block = x[row, column // 32 * 32 : column // 32 * 32 + 32]
            expected = power(max(float(np.abs(block).max()), 6 * 2.0**-126), 6.0)
            assert scale[row, column // 32] == expected
            byte = int(packed.view(np.uint8)[row, column // 2])
            code = byte & 15 if column % 2 == 0 else byte >> 4
            assert code & 7 == nearest_even(x[row, column] / expected, E2M1)
            assert code >> 3 == int(np.signbit(x[row, column]))


def test_fp8_is_the_plain_restatement():
    x = random((130, 200))
    codes, scale = fp8.quantise(x)
    assert scale.shape == (2, 2)
    for p, q in np.ndindex(2, 2):
        block = x[p * 128 : p * 128 + 128, q * 128 : q * 128 + 128]
        expected = power(max(float(np.abs(block).max()), 1e-4), 448.0)
        assert scale[p, q] == expected
        rows, columns = np.random.default_rng(1).integers(0, block.shape, (400, 2)).T
        for value, code in zip(
            block[rows, columns],
            codes.view(np.uint8)[p * 128 + rows, q * 128 + columns],
            strict=True,
        ):
            assert code & 127 == nearest_even(value / expected, E4M3) and code >> 7 == int(
                np.signbit(value)
            )


def test_the_largest_number_decides_the_scale():
    for amax, expected in ((448, 1), (449, 2), (224, 0.5), (224.1, 1)):
        assert fp8.block_scale(np.full((1, 1), amax, np.float32)) == expected
    for amax, expected in ((6, 1), (6.1, 2), (3, 0.5)):
        assert mxfp4.block_scale(np.full((1, 32), amax, np.float32)) == expected


def test_every_code_survives_both_ways():
    codes = (
        np.array([code for code in range(256) if code & 127 != 127], np.uint8)
        .view(fp8.E4M3)[None]
        .repeat(3, 0)
    )
    for scale in (1.0, 2.0**-100, 2.0**100, 0.3):
        scale_PQ = np.full(fp8.scale_shape(codes.shape), scale, np.float32)
        again, _ = fp8.quantise(fp8.dequantise(codes, scale_PQ), scale_PQ)
        np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))
    packed = np.arange(256, dtype=np.uint8).view(np.int8).reshape(2, 128)
    for byte in (1, 127, 200):
        scale_OQ = scales.from_ue8m0(np.full((2, 8), byte, np.uint8))
        again, _ = mxfp4.quantise(mxfp4.dequantise(packed, scale_OQ), scale_OQ)
        np.testing.assert_array_equal(again, packed)


def test_quantising_what_was_quantised_changes_no_number():
    for code, x in ((mxfp4, random((6, 96))), (fp8, random((130, 200)))):
        numbers = code.dequantise(*code.quantise(x))
        np.testing.assert_array_equal(code.dequantise(*code.quantise(numbers)), numbers)


def test_the_low_nibble_is_the_even_column():
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = 6, -0.5, 1, 3
    packed, scale = mxfp4.quantise(x)
    assert scale == 1 and packed.view(np.uint8)[0, :2].tolist() == [0x97, 0x52]
    np.testing.assert_array_equal(mxfp4.dequantise(packed, scale), x)


def test_ue8m0_bytes():
    byte = np.arange(255, dtype=np.uint8)
    scale = scales.from_ue8m0(byte)
    np.testing.assert_array_equal(scale.astype(np.float64), 2.0 ** (np.arange(255) - 127.0))
    np.testing.assert_array_equal(scales.to_ue8m0(scale), byte)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda: scales.from_ue8m0(np.array([[3, 255]], np.uint8)),
            r"got byte 255 \(NaN\) at \[0, 1\]",
        ),
        (lambda: scales.to_ue8m0(np.array([3.0], np.float32)), "got 3.0; must be a power of two"),
        (
            lambda: scales.check_float_scale(np.array([-1.0], np.float32)),
            "got -1.0 .* must be positive, finite",
        ),
        (
            lambda: fp8.quantise(np.full((1, 1), np.nan, np.float32)),
            "got nan; fp8 and MXFP4 hold finite numbers only",
        ),
        (lambda: mxfp4.quantise(np.full((1, 32), np.inf, np.float32)), "got inf; fp8 and MXFP4"),
        (
            lambda: mxfp4.quantise(np.ones((1, 31), np.float32)),
            "got 31 input features; must be a multiple of 32",
        ),
        (
            lambda: fp8.dequantise(np.full((1, 1), 127, np.uint8), np.ones((1, 1), np.float32)),
            "e4m3 NaN",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(action, message):
    with pytest.raises(ValueError, match=message):
        action()


def test_fp8_codes_are_those_of_a_cast():
    bits = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    y = np.concatenate(
        [(bits + np.uint32(low)).view(np.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    )
    y = y[np.isfinite(y)]
    np.testing.assert_array_equal(
        fp8.codes(y), np.clip(y, -448, 448).astype(fp8.E4M3).view(np.uint8)
    )


def test_mxfp4_of_bfloat16_bits_is_that_of_the_numbers():
    """Blocks hold every finite bfloat16, of all sizes and of one size.

    The scale is the one that follows from the block, or each of all scales.
    """
    every = np.arange(2**16, dtype=np.uint16).view(mxfp4.BFLOAT16)
    every = every[np.isfinite(every.astype(np.float32))]
    by_size = every[np.argsort(np.abs(every.astype(np.float32)), kind="stable")]
    zeros = np.array([0.0, -0.0] * 16, mxfp4.BFLOAT16)
    x = np.concatenate(
        [every, by_size, zeros, np.random.default_rng(0).permutation(every)]
    ).reshape(-1, mxfp4.BLOCK)
    given = [scales.from_ue8m0(np.full((len(x), 1), byte, np.uint8)) for byte in range(255)]
    for scale, rows in [(None, x), *((scale[::97], x[::97]) for scale in given)]:
        with np.errstate(over="ignore"):
            packed, found = mxfp4.quantise(rows, scale)
            expected, wanted = mxfp4.quantise(rows.astype(np.float32), scale)
        np.testing.assert_array_equal(packed, expected)
        np.testing.assert_array_equal(found, wanted)
    short = [row for row in x if mxfp4._quantise_bits(row[None], None) is not None]
    assert len(short) > 0.95 * len(x)  # the short way is what was tested
