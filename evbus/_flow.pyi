"""The memory of subscriptions with an overflow policy of their own. Everything in it is C; see `_flow.pxd`."""
