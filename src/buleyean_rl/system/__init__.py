"""The machine: nothing here knows of models.

outputs       files and folders that the user names: checked, claimed, written
files         files and folders written whole or not at all
launcher      which of several processes this one is
locks         locks between processes
cache         results kept on disk between runs
disk          room for what is written, and full disks
progress      how far a command is: a bar, or lines
memory        what becomes of freed memory
environment   what the libraries below torch read when they are loaded
host          cores, versions of libraries, peak memory
lazy          a sequence whose items are made when they are asked for
"""
