"""The hot formulas as compiled loops over stored bytes, equal bit for bit to the reference functions in `methods/`.

What the kernels of a formula share:

    raw        [N, bytes] uint8   one row a source, the models in order, then the base; elements [0, n) of the block
    codes      [N] int64          number format of each row, `formats.CODES`
    n                             elements in the block
    rows, step                    instead of raw and codes: sources that the kernel reads for itself, `spans.fill`
    out        [bytes] uint8      receives the result
    out_code                      its number format
    drift      [2] float64        |result - W|^2 and |W|^2 are added, W the base or the first model
    result                        bit 0: an input is not finite; bit 1: the output is not; bit 2: a file is unreadable

A piece of 2048 elements is widened into the first-level cache, computed with in float32, and narrowed again.
"""
