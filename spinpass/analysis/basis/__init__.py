"""Which tensor axes must share one basis: such a space is found by a walk from a seed over the whole graph."""
