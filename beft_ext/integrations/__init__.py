"""Meeting points with other libraries; each is loaded only when it is used."""
