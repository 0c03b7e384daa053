"""The public ops: one file each, with its checks, dispatch, operator registration and autograd."""
