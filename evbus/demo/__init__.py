"""The demo: the scenario of the original library, played by real processes on a real port.

`story` tells it and checks that everything happens as promised; `stage` starts the processes and talks with them;
`actors` is what runs in them, and so the place to look at for how evbus is used; `mails` has the typed classes.
"""
