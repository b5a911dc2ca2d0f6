{{- /*
What every pod of the chart has in common, and what the site adds to it: the values `pods`, `proxy` and `certificates`.

Templates hand their pod over as text, and get it back with all of that. Whatever is put together (a pod with the block
`all`, then with that of its workload) follows one rule: maps key by key, lists one behind the other, and of anything
else the last counts.
*/ -}}

{{- /* Changes the dict `to`: include returns nothing but text. */ -}}
{{- define "nvila.add" -}}
{{- $to := .to }}
{{- range $key, $value := .from }}
{{- $before := index $to $key }}
{{- if and $before (kindIs "map" $value) }}
{{- $value = deepCopy $before }}
{{- range $name, $one := index $.from $key }}{{ $_ := set $value $name $one }}{{ end }}
{{- else if and $before (kindIs "slice" $value) }}
{{- $value = concat $before $value }}
{{- end }}
{{- $_ := set $to $key $value }}
{{- end }}
{{- end }}

{{- /* The blocks `all` and `workload` of the values, as JSON. */ -}}
{{- define "nvila.block" -}}
{{- $block := deepCopy .root.Values.pods.all }}
{{- include "nvila.add" (dict "to" $block "from" (index .root.Values.pods .workload)) }}
{{- toJson $block }}
{{- end }}

{{- /* Variables of the values `proxy` and `certificates`, as JSON. */ -}}
{{- define "nvila.surroundings" -}}
{{- $variables := dict }}
{{- with .Values.proxy.url }}
{{- $spared := concat (list "127.0.0.1" "localhost" "::1" ".svc" ".cluster.local") $.Values.proxy.noProxy | join "," }}
{{- range $name, $value := dict "HTTP_PROXY" . "HTTPS_PROXY" . "NO_PROXY" $spared }}
{{- /* curl reads small letters only, others the large ones. */}}
{{- range list $name (lower $name) }}{{ $_ := set $variables . $value }}{{ end }}
{{- end }}
{{- end }}
{{- if .Values.certificates.enabled }}
{{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "CURL_CA_BUNDLE" "AWS_CA_BUNDLE" }}
{{- $_ := set $variables . "/etc/nvila-certificates/ca.crt" }}
{{- end }}
{{- end }}
{{- toJson $variables }}
{{- end }}

{{- /*
A pod template: `pod` with everything.

root: the chart's top. workload: its name in the values `pods`. user: of its images, 65532 where it is left out.
*/ -}}
{{- define "nvila.pod" -}}
{{- $values := .root.Values }}
{{- $pod := fromYaml .pod }}
{{- with $pod.Error }}{{ fail . }}{{ end }}
{{- $block := include "nvila.block" . | fromJson }}
{{- include "nvila.add" (dict "to" $pod.metadata "from" (pick $block "labels" "annotations")) }}
{{- $spec := $pod.spec }}
{{- $security := include "nvila.podSecurity" (.user | default 65532) | fromYaml }}
{{- if $block.anyUser }}
{{- $security = omit $security "runAsUser" "runAsGroup" "fsGroup" }}
{{- end }}
{{- $_ := set $spec "securityContext" $security }}
{{- if not (hasKey $spec "automountServiceAccountToken") }}
{{- $_ := set $spec "automountServiceAccountToken" false }}
{{- end }}
{{- $secrets := list }}
{{- range $values.images.pullSecrets }}{{ $secrets = append $secrets (dict "name" .) }}{{ end }}
{{- if $secrets }}{{ $_ := set $spec "imagePullSecrets" $secrets }}{{ end }}
{{- range $key, $value := pick $block "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" "serviceAccountName" }}
{{- if $value }}{{ include "nvila.add" (dict "to" $spec "from" (dict $key $value)) }}{{ end }}
{{- end }}
{{- /* The API server takes one constraint of a key and a way. Each counts the workload's own pods. */}}
{{- $constraints := dict }}
{{- range $spec.topologySpreadConstraints }}
{{- $own := pick $pod.metadata.labels "app.kubernetes.io/instance" "app.kubernetes.io/part-of" "app.kubernetes.io/component" }}
{{- $_ := set $constraints (printf "%s %s" .topologyKey .whenUnsatisfiable) (merge (dict "labelSelector" (dict "matchLabels" $own)) .) }}
{{- end }}
{{- if $constraints }}
{{- $ordered := list }}
{{- range keys $constraints | sortAlpha }}{{ $ordered = append $ordered (index $constraints .) }}{{ end }}
{{- $_ := set $spec "topologySpreadConstraints" $ordered }}
{{- end }}

{{- $given := include "nvila.surroundings" .root | fromJson }}
{{- include "nvila.add" (dict "to" $given "from" ($block.env | default dict)) }}
{{- $volumes := $block.volumes | default dict }}
{{- if $values.certificates.enabled }}
{{- $_ := set $volumes "/etc/nvila-certificates" (dict "configMap" (dict "name" "nvila-certificates") "readOnly" true) }}
{{- end }}
{{- $mounts := list }}
{{- range $path, $volume := $volumes }}
{{- $name := printf "extra-%s" (sha256sum $path | trunc 8) }}
{{- $mounts = append $mounts (merge (dict "name" $name "mountPath" $path) (pick $volume "readOnly" "subPath")) }}
{{- $_ := set $spec "volumes" (append ($spec.volumes | default list) (merge (dict "name" $name) (omit $volume "readOnly" "subPath"))) }}
{{- end }}

{{- range concat ($spec.initContainers | default list) $spec.containers }}
{{- $container := . }}
{{- $_ := set $container "imagePullPolicy" $values.images.pullPolicy }}
{{- $_ := set $container "securityContext" (include "nvila.containerSecurity" $ | fromYaml) }}
{{- range $kind, $amounts := $container.resources }}
{{- range $name, $amount := $amounts }}{{ $_ := set $amounts $name (toString $amount) }}{{ end }}
{{- end }}
{{- $environment := list }}
{{- range $container.env }}
{{- if not (hasKey $given .name) }}{{ $environment = append $environment . }}{{ end }}
{{- end }}
{{- range $name, $value := $given }}
{{- $environment = append $environment (dict "name" $name (ternary "value" "valueFrom" (kindIs "string" $value)) $value) }}
{{- end }}
{{- if $environment }}{{ $_ := set $container "env" $environment }}{{ end }}
{{- if $mounts }}
{{- $_ := set $container "volumeMounts" (concat ($container.volumeMounts | default list) $mounts) }}
{{- end }}
{{- end }}
{{- toYaml $pod }}
{{- end }}

{{- /* The account of a workload's pods. */ -}}
{{- define "nvila.account" -}}
{{- $annotations := (include "nvila.block" . | fromJson).serviceAccountAnnotations -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: nvila-{{ .workload }}
  labels: {{- include "nvila.labels" .root | nindent 4 }}
  {{- with $annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}
