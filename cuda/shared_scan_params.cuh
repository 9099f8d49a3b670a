// What the launcher of shared_scan.cu and merged_scan.cu gives them: addresses, sizes, strides in elements.

struct Params {
    int64 u, delta, A, B, C, delta_bias, out, table;
    int64 directions, groups, states, parts, rank, height, width, rows_tile, columns_tile, skew, sum_cap;
    int64 u_b, u_k, u_r, u_h, u_w, delta_b, delta_k, delta_n, delta_h, delta_w;
    int64 B_b, B_k, B_r, B_n, B_h, B_w, C_b, C_k, C_n, C_h, C_w;
};
