"""What a process shares with others on the machine: files that are whole or not there, folders that one holds."""
