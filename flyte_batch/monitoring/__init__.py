"""What happens while records are inferred, as one stream of events, and who wants to hear of it.

`events` are the words, `hooks` deliver them, `scope` says whose work it is. Each of the other modules is one backend:
it takes events and gives them to something else, and loads that library only when it is asked for.
"""
