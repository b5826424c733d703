"""The commands of `kdjax COMMAND`, one file each."""
