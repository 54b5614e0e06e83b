"""A test double of pycuda: the calls that its documentation names, on the host's memory."""

VERSION_TEXT = "2022.1"
