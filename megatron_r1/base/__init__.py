"""What every other package may use: errors that end a command, files that are complete or absent,
child processes and messages to them, numbers as text, and functions that a recipe names as
`module:function`. It imports nothing else of this project."""
