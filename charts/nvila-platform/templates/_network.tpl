{{- /* Whom the pods of the chart call. */ -}}

{{- define "nvila.egressDNS" }}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}

{{- define "nvila.egressS3" }}
{{- $address := (.Values.s3.endpoint | default "https://s3.amazonaws.com" | urlParse) }}
- ports:
    - {protocol: TCP, port: {{ regexFind "[0-9]+$" (regexFind ":[0-9]+$" $address.host) | default (ternary "80" "443" (eq $address.scheme "http")) }}}
{{- end }}

{{- define "nvila.egressPostgres" }}
- ports:
    - {protocol: TCP, port: {{ .Values.mlflow.postgres.port }}}
  {{- if eq .Values.mlflow.postgres.mode "own" }}
  to:
    - podSelector:
        matchLabels: {{- include "nvila.selector" (dict "root" . "component" "postgres") | nindent 10 }}
  {{- end }}
{{- end }}
