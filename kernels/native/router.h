// The router of a routed feed-forward layer: a logit for each row of x and group. fp32 sums in one order decide.
#pragma once
#include "linear.h"

struct Router {
    Linear fp32;        // logits [m, groups] = x [m, k] router [groups, k]^T
    Rows rows;          // its kernel: the sums that decide
    const i64* awake;   // [m], 0 for rows whose logits nobody reads; or null
    const u32* packed;  // x for tiles, or null
    float* lengths;     // [m], of rows of x, for tiles
    float threshold;
};

// bf16 x on AMX tiles: lengths of rows begin .. end of x; then, for all rows, logits of groups begin .. end. Each lies
// on the side of the threshold where the sum that decides lies, and is that sum where tiles cannot tell.
void measure(const Router& a, i64 begin, i64 end);
void route_on_tiles(const Router& a, i64 begin, i64 end);
