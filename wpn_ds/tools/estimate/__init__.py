"""``wpn-ds estimate``: what a run needs of memory, network and time, before it is queued for."""
