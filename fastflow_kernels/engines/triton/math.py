"""Elementary functions for kernels, in float32 and float64.

They are written in Triton alone, so that its interpreter runs them too.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LN5 = tl.constexpr(1.6094379124341003)
LN10 = tl.constexpr(2.302585092994046)
PI_4 = tl.constexpr(0.7853981633974483)
# It has few digits, so that its product with an integer below 2**11 is exact in float32.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440054690583e-4)  # ln 2 - LN2_HIGH
# 1.5 * 2**23. Float32 numbers near it are integers, in the low bits of their representation.
INTEGERS = tl.constexpr(12582912.0)
INTEGERS_BITS = tl.constexpr(0x4B400000)


@triton.jit
def product(a, b):
    """Return a * b of two tiles, rounded before it is added to a sum.

    The compiler may fuse a plain product into the first addition. Threads that hold copies of a sum
    add in different orders, so their copies would differ by a rounding. The result would depend on
    which copy is stored.
    """
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def exp(x):
    """Return exp(x), with a relative error below 4 * 2**-23 if the result is normal.

    Subnormal results are rounded like any product. In float32 it is exp2(r / ln 2) * 2**k with
    |r| < 0.35. The hardware's exp2 would turn a subnormal result into 0. Therefore 2**k is
    multiplied in two halves, which are normal numbers.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        shifted = tl.minimum(tl.maximum(x, -120.0), 120.0) * LOG2E + INTEGERS
        n = shifted - INTEGERS
        r = (x - n * LN2_HIGH) - n * LN2_LOW  # inf and NaN stay what they are
        k = shifted.to(tl.int32, bitcast=True) - INTEGERS_BITS
        half = k >> 1
        return tl.exp2(r * LOG2E) * power_of_two(half) * power_of_two(k - half)


@triton.jit
def power_of_two(k):
    """Return 2**k in float32, for an int32 -127 < k < 128."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_of_bounded(x):
    """Return exp(x) in fewer instructions.

    In float32 the relative error grows as |x| * 2**-24, no faster than that of a rounded x.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def log1p_of_unit(x):
    """Return log(1 + x) for x in [0, 1], accurate for small x.

    - float64: with w = 1 + x, the rounding of w cancels in log(w) / (w - 1).
    - float32: it is 2 * atanh(x / (2 + x)), a polynomial with a relative error of 5e-9.
    """
    if x.dtype == tl.float64:
        w = 1.0 + x
        d = tl.where(w == 1.0, 1.0, w - 1.0)
        return tl.where(w == 1.0, x, tl.log(w) * (x / d))
    else:
        u = x / (2.0 + x)
        v = u * u
        p = ((2.7970224e-1 * v + 2.8011294e-1) * v + 4.0020857e-1) * v + 6.6666431e-1
        return 2.0 * u + u * v * p


@triton.jit
def log_of_double(w):
    """Return log(w) in float32, of a float64 that is positive and normal, inf or NaN.

    The relative error is a few 2**-24, also near w = 1. It splits w = c * 2**n with c in
    [sqrt(1/2), sqrt(2)). log(c) = 2 * atanh((c - 1) / (c + 1)) is a polynomial with a relative
    error of 1e-9.
    """
    bits = w.to(tl.int64, bitcast=True)
    n = ((bits >> 32).to(tl.int32) - 0x3FE6A09E) >> 20
    c = (bits - (n.to(tl.int64) << 52)).to(tl.float64, bitcast=True)
    d = (c - 1.0).to(tl.float32)
    u = d / (2.0 + d)
    v = u * u
    p = (2.9866281e-1 * v + 3.9977783e-1) * v + 6.6666774e-1
    m = n.to(tl.float32)
    log = m * LN2_HIGH + (m * LN2_LOW + (2.0 * u + u * v * p))
    return tl.where(w < float("inf"), log, w.to(tl.float32))


@triton.jit
def exp_to_double(x):
    """Return exp(x) in float64 with a relative error of 3e-10, for a float64 |x| < 700."""
    n = tl.floor(x.to(tl.float32) * LOG2E + 0.5)
    r = x - n.to(tl.float64) * LN2
    # The Taylor series with 1/8!, 1/7!, ... for |r| < 0.35.
    p = r * 2.480158730158730e-5 + 1.984126984126984e-4
    p = p * r + 1.388888888888889e-3
    p = p * r + 8.333333333333333e-3
    p = p * r + 4.166666666666667e-2
    p = p * r + 1.666666666666667e-1
    p = (p * r + 0.5) * r + 1.0
    p = p * r + 1.0
    return p * ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def tanh(x):
    """Return tanh(x) to a few ulp at every magnitude. tanh(inf) is 1 and tanh(NaN) is NaN.

    - Below |x| = 0.625 it is Cephes' polynomial (float32) or rational function (float64).
    - From there on it is 1 - 2 / (exp(2 * |x|) + 1) with the sign of x. With a negative x instead
      of |x| the quotient would lie in [1, 2), and its rounding error would be twice as large.
    """
    z = x * x
    if x.dtype == tl.float64:
        p = (
            -9.64399179425052238628e-1 * z - 9.92877231001918586564e1
        ) * z - 1.61468768441708447952e3
        q = (
            (z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3
        ) * z + 4.84406305325125486048e3
        p = p / q
        e = tl.exp(2.0 * tl.abs(x))
    else:
        p = -5.70498872745e-3 * z + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        e = tl.exp2(tl.abs(x) * (2.0 * LOG2E))
    near_zero = x + x * z * p
    elsewhere = 1.0 - 2.0 / (e + 1.0)  # 1 if exp overflows to inf
    return tl.where(tl.abs(x) < 0.625, near_zero, with_sign_of(x, elsewhere))


@triton.jit
def atan(x):
    """Return atan(x) to a few ulp at every magnitude. atan(inf) is pi / 2 and atan(NaN) is NaN.

    It is Cephes' polynomial (float32) or rational function (float64) of t = x below tan(pi / 8).
    Beyond, atan(|x|) is pi / 4 + atan((|x| - 1) / (|x| + 1)), from tan(3 pi / 8) on
    pi / 2 + atan(-1 / |x|).
    """
    size = tl.abs(x)
    is_near = size < 0.4142135623730951
    is_far = size > 2.414213562373095
    t = tl.where(is_far, -1.0, size - 1.0) / tl.where(is_far, size, size + 1.0)
    t = tl.where(is_near, x, t)
    z = t * t
    if x.dtype == tl.float64:
        p = (-8.750608600031904122785e-1 * z - 1.615753718733365076637e1) * z
        p = (p - 7.500855792314704667340e1) * z - 1.228866684490136173410e2
        q = ((z + 2.485846490142306297962e1) * z + 1.650270098316988542046e2) * z
        q = ((q + 4.328810604912902668951e2) * z + 4.853903996359136964868e2) * z
        p = (p * z - 6.485021904942025371773e1) / (q + 1.945506571482613964425e2)
    else:
        p = 8.05374449538e-2 * z - 1.38776856032e-1
        p = p * z + 1.99777106478e-1
        p = p * z - 3.33329491539e-1
    near_zero = t + t * z * p
    elsewhere = tl.where(is_far, 2.0 * PI_4 + near_zero, PI_4 + near_zero)
    return tl.where(is_near, near_zero, with_sign_of(x, elsewhere))


@triton.jit
def clamped(z, FUNCTION: tl.constexpr, CLAMP: tl.constexpr):
    """Return f(z) for s = CLAMP * f(z), where FUNCTION is the clamp function f.

    The error of s is CLAMP times as large. A large clamp, which is rare, computes f in float64.
    """
    w = z if CLAMP >= -4.0 and CLAMP <= 4.0 else z.to(tl.float64)
    if FUNCTION == "tanh":
        return tanh(w).to(z.dtype)
    else:
        tl.static_assert(FUNCTION == "atan")
        return atan(w).to(z.dtype)


@triton.jit
def clamp_slope(z, f, FUNCTION: tl.constexpr):
    """Return f'(z), given f = f(z)."""
    return 1.0 - f * f if FUNCTION == "tanh" else 1.0 / (1.0 + z * z)


@triton.jit
def exp_of_factor(s, CLAMP: tl.constexpr):
    """Return exp(s) for s = CLAMP * clamped(...).

    It uses fewer instructions while their error, |s| * 2**-24, is no larger than that of s.
    """
    if CLAMP >= -4.0 and CLAMP <= 4.0:
        return exp_of_bounded(s)
    else:
        return exp(s)


@triton.jit
def with_sign_of(x, y):
    """Return y with the sign of x, for y >= 0."""
    if x.dtype == tl.float64:
        return tl.where(x < 0.0, -y, y)
    else:
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        return (y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(g, ACTIVATION: tl.constexpr):
    """Return scale = activation(g), as defined in coupling.CouplingSpec."""
    if ACTIVATION == "SIGMOID":
        z = g - 2.0
        e = exp(-tl.abs(z))  # exp(-z) would overflow although the sigmoid does not
        return 10.0 * tl.where(z < 0.0, e, 1.0) / (1.0 + e)
    elif ACTIVATION == "SOFTPLUS":
        h = 0.5 * g
        # torch's softplus is the identity above 20. In float64 that differs from log(1 + e**h).
        return tl.where(
            h > 20.0, 0.1 * g, 0.2 * (tl.maximum(h, 0.0) + log1p_of_unit(exp(-tl.abs(h))))
        )
    else:
        tl.static_assert(ACTIVATION == "EXP")
        return exp(g)


@triton.jit
def log_scale_of(g, ACTIVATION: tl.constexpr):
    """Return log(activation(g)), as accurate near scale 1 as elsewhere.

    The log of a rounded scale would be off by the same rounding in every channel, and by P times as
    much in the sum. For a float32 g only the steps that cancel are in float64. If all were, they
    would be most of what a small launch computes.
    """
    if ACTIVATION == "EXP":
        return g
    elif g.dtype == tl.float64:
        return tl.log(scale_of(g, ACTIVATION))
    elif ACTIVATION == "SIGMOID":
        x = 2.0 - g.to(tl.float64)
        near = tl.where(tl.abs(x) < 80.0, x, -80.0)
        log = -log_of_double(0.1 + 0.1 * exp_to_double(near))
        return tl.where(x >= 80.0, LN10 - x.to(tl.float32), tl.where(x == x, log, g))
    else:
        tl.static_assert(ACTIVATION == "SOFTPLUS")
        h = 0.5 * g
        low = log1p_of_unit(exp(-tl.abs(h)))
        log = log_of_double(0.2 * (tl.maximum(h, 0.0).to(tl.float64) + low.to(tl.float64)))
        return tl.where(h < -20.0, h - LN5, log)


@triton.jit
def scale_slope(g, scale, ACTIVATION: tl.constexpr):
    """Return d scale / d g, given scale = activation(g)."""
    if ACTIVATION == "SIGMOID":
        # A fused product is not rounded, so that 1 - 0.1 * 10 would be negative.
        return scale * tl.maximum(1.0 - 0.1 * scale, 0.0)
    elif ACTIVATION == "SOFTPLUS":
        return 0.1 / tl.where(g > 40.0, 1.0, 1.0 + exp(-0.5 * g))
    else:
        tl.static_assert(ACTIVATION == "EXP")
        return scale
