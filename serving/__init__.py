"""What every server has in common. Import it before `grpc`, which reads the variable when it is
imported.
"""

import os

# At its own level INFO, gRPC's core writes a raw line to stderr for each handshake that fails, so
# that any client that can connect could fill the disk.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
