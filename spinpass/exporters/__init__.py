"""Ways out of torch: one module per runtime. Importing this package imports none of them, so none of their
dependencies."""
