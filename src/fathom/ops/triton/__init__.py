"""The Triton kernel of each op, under the same file name; imported only where it runs.

A kernel never changes the meaning of its op. None uses atomic operations: every sum has one order,
so that the same inputs give the same bits.
"""
