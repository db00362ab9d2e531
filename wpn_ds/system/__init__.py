"""What a process shares with the machine: files that are whole or not there, folders that one holds, tables to read."""
