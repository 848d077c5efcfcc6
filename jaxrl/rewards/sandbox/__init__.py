"""Untrusted Python programs in processes of their own.

    worker --socket--> zygote --fork--> supervisor --fork--> checker   (first process of a namespace)
    client.py          zygote.py                   --fork--> program

`client` is what others import. The zygote is a bare interpreter with an empty environment that imports
this folder alone, hence the relative imports and nothing of jaxrl in all files but `client`.
The checker holds what must not be forged, in a process that no line of the program runs in.
"""
