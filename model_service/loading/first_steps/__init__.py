"""The first steps of a rank, before it serves: what they take, and the kernels that they load."""
