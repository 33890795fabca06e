// exp for the vector levels, written once over the functions of a vec_*.h. Included inside a namespace.

// 2^n exp(r) with |r| <= ln 2 / 2 and a Taylor series; relative error about 1e-7, 0 far below and infinity far above.
static inline V exp(V x) {
    x = minimum(splat(89.0f), maximum(splat(-105.0f), x));  // this order of operands keeps a NaN
    const V n = round(x * splat(1.44269504f));
    const V r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));  // ln 2 in two parts
    V series = splat(1.0f / 5040);
    constexpr float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float term : terms) series = fma(series, r, splat(term));
    return scale_by_power(series, n);
}
