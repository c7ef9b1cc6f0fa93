"""wfm: a workflow manager for observatories.

Finds every gap (data that no valid result covers), turns it into a run, executes it, collects the products
with lineage back to the raw data, and says for any piece of data why it has or has not been processed.
"""

__version__ = "0.1.0"
