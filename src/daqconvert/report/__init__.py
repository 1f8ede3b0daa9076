"""What people look at: tables, pictures, progress bars, the page of a run; of the package it imports only `spec`."""
