"""The machine and the process: devices, memory, several processes, outputs that appear whole or not at all."""
