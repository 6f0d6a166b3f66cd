"""Vector databases that an export can be loaded into: a file each, behind `protocol.Store`."""
